"""The chat page in a browser: what a person does with it, on a screen and on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Browser
from scripted import Script, running

from tandem.server.page import PAGE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
ALT = 1
EVERYTHING = """# Head

Some **bold**, *slanted*, __bold__, _slanted_, ~~gone~~ and `a < b` text, snake_case_name and 2 * 3 * 4.
A second line, <b>no HTML</b>, <img src=x onerror="document.title='broken'"> and [bad](javascript:alert(1)).

1. one
2. two
   - inner *x*
   - inner

* loose

* list

> quoted
> lines

| a | b |
|---|--:|
| 1 | `x\\|y` |

---

~~~python
print("<hi>")  # **not bold**
~~~

See https://example.com/a_b, [here](https://example.com "title") and <https://example.org>. ![a picture](https://e.com/x.png)

```
never closed <script>document.title = 'broken'</script>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def script() -> Script:
    return Script("tuned", "base")


@pytest.fixture
def page(browser: Browser, script: Script) -> Iterator[Browser]:
    """The page, opened again on a screen; it must not have made an error."""
    with running(script.app()) as url:
        browser.size(1200, 800)
        browser.errors.clear()
        browser.open(url)
        browser.wait("models.length === 2 || document.querySelector('dialog').open")
        yield browser
        browser.open("about:blank#left")
    assert browser.errors == []


def say(page: Browser, text: str) -> None:
    page.write(text)
    page.press("Enter")
    page.wait(f"turns.length > 0 && turns[turns.length - 1].said === {text!r}")


def ask(page: Browser, text: str) -> None:
    say(page, text)
    page.wait("running.size === 0")


def test_the_page_is_one_document_that_fetches_nothing() -> None:
    fetched = re.findall(r"""(?:src|href)=["']?([^"'\s>]*)""", PAGE)
    assert [address for address in fetched if not address.startswith(("#", "data:"))] == []
    assert "@import" not in PAGE
    assert "innerHTML" not in PAGE
    assert len(PAGE) < 60_000


def test_markdown_becomes_nodes_and_never_html(page: Browser, script: Script) -> None:
    script.text, script.size = EVERYTHING, 3
    ask(page, "Everything")
    assert page.value("document.querySelectorAll('.md :is(b, img, script, iframe)').length") == 0
    assert page.value("document.title") == "tuned - Tandem"
    expected = {
        "h1": "Head",
        "p strong": "bold",
        "p em": "slanted",
        "p del": "gone",
        "p code": "a < b",
        "ol > li": "one",
        "ol > li > ul > li em": "x",
        "blockquote": "quoted\nlines",
        "td:last-child code": "x|y",
        ".code code": 'print("<hi>")  # **not bold**',
    }
    for selector, text in expected.items():
        assert page.value(f"document.querySelector('.md {selector}').innerText") == text, selector
    assert page.value("[...document.querySelectorAll('.md p strong')].length") == 2
    assert page.value("[...document.querySelectorAll('.md p em')].length") == 2
    links = page.value("[...document.querySelectorAll('.md a')].map(link => link.href)")
    assert links == ["https://example.com/a_b", "https://example.com/", "https://example.org/", "https://e.com/x.png"]
    whole = page.value("document.querySelector('.md').innerText")
    for kept in (
        "snake_case_name",
        "2 * 3 * 4",
        "<b>no HTML</b>",
        "[bad](javascript:alert(1))",
        "never closed <script>",
    ):
        assert kept in whole, kept
    page.value("(window.again = document.createElement('div'), showMarkdown(again, turns[0].answers[0].text))")
    assert page.value("again.innerHTML === document.querySelector('.md').innerHTML")  # as if it had come at once


def test_an_answer_is_seen_while_it_is_written_and_stops_at_escape(page: Browser, script: Script) -> None:
    script.text, script.pause = "word " * 5000, 0.01
    say(page, "Long")
    page.wait("document.querySelector('.md').innerText.length > 100")
    assert page.value("document.querySelector('#go').getAttribute('aria-label')") == "Stop (Esc)"
    assert "tokens/s" in page.value("document.querySelector('.answer small').innerText")
    page.press("Escape")
    page.wait("running.size === 0")
    assert page.value("document.querySelector('.answer small').innerText") == "stopped"
    kept = page.value("turns[0].answers[0].text")
    assert 100 < len(kept) < 20_000
    script.text = "short"
    ask(page, "And now?")
    assert [message["content"] for message in script.bodies[-1]["messages"]] == ["Long", kept, "And now?"]
    assert script.gone == 1


def test_a_thought_is_folded_and_is_not_sent_back(page: Browser, script: Script) -> None:
    script.thought, script.text = "First I think.", "Then I say."
    ask(page, "Hi")
    assert page.value("document.querySelector('.thought').open") is False
    assert page.value("document.querySelector('.thought summary').innerText").startswith("Thought for")
    page.click(".thought summary")
    assert "First I think." in page.value("document.querySelector('.thought').innerText")
    assert "think" not in page.value("document.querySelector('.md').innerText")
    ask(page, "More")
    assert script.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Then I say."}


def test_editing_and_regenerating_begin_again_from_there(page: Browser, script: Script) -> None:
    script.text = "A"
    ask(page, "one")
    ask(page, "two")
    script.text = "B"
    page.press("r", "KeyR", ALT)
    page.wait("turns[1].answers[0].text === 'B' && running.size === 0")
    assert len(script.bodies) == 3
    page.click(".turn:first-child .said [aria-label=Edit]")
    page.wait("Boolean(document.activeElement.closest('.editing'))")
    page.value("document.activeElement.select()")
    page.write("other")
    page.press("Enter")
    page.wait("turns.length === 1 && turns[0].answers[0].text === 'B' && running.size === 0")
    assert script.bodies[-1]["messages"] == [{"role": "user", "content": "other"}]
    page.press("ArrowUp")
    page.wait("Boolean(document.activeElement.closest('.editing'))")
    page.press("Escape")
    page.wait("document.activeElement.id === 'text'")
    assert page.value("document.querySelector('.bubble').innerText") == "other"


def test_settings_are_sent_and_last(page: Browser, script: Script) -> None:
    page.press("s", "KeyS", ALT)
    numbers = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 9, "seed": 3}
    for name, value in {**numbers, "system": "Be brief.", "thinking": "off"}.items():
        page.value(f"document.querySelector('dialog [name={name}]').value = '{value}'")
    page.press("Escape")
    page.wait("settings.system === 'Be brief.'")  # they are kept by an event that comes after the focus
    script.text = "x"
    ask(page, "Hi")
    body = script.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in numbers} == numbers
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    page.call("Page.reload")
    page.wait("document.readyState === 'complete' && models.length === 2")
    assert page.value("settings.top_k") == 20
    assert page.value("document.querySelector('.md').innerText") == "x"  # the conversation, too
    page.press("n", "KeyN", ALT)
    assert page.value("turns.length") == 0


def test_both_models_answer_side_by_side(page: Browser, script: Script) -> None:
    script.text = "same"
    page.press("c", "KeyC", ALT)
    ask(page, "Hi")
    assert sorted(body["model"] for body in script.bodies) == ["base", "tuned"]
    assert page.value("[...document.querySelectorAll('.answer h3')].map(head => head.innerText)") == ["tuned", "base"]
    left, right = page.value("[...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().left)")
    assert left < right
    page.value("turns[0].answers[1].text = 'other'")
    ask(page, "And?")
    earlier = {body["model"]: body["messages"][1]["content"] for body in script.bodies[2:]}
    assert earlier == {"tuned": "same", "base": "other"}


def test_what_was_said_and_answered_can_be_copied(page: Browser, script: Script) -> None:
    """Also where the page has no clipboard, as over http from another machine."""
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    script.text = "Use it:\n\n```python\nprint(1)\n```\n\nDone."
    ask(page, "Say **it**")
    for place, text in ((".said", "Say **it**"), (".answer .actions", script.text), (".answer .code", "print(1)")):
        page.click(f"{place} [aria-label=Copy]")
        page.wait(f"navigator.clipboard.readText().then(found => found === {json.dumps(text)})")
    page.value("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.value("document.addEventListener('copy', () => { window.copied = document.activeElement.value })")
    page.click(".said [aria-label=Copy]")
    page.wait("window.copied === 'Say **it**'")
    assert page.value("document.querySelectorAll('body > textarea').length") == 0


READ = ("body", ".bubble", ".md p", ".md p code", ".md a", ".md pre code", ".thought summary", "#text")


def test_the_page_follows_dark_mode(page: Browser, script: Script) -> None:
    """Text stays readable: what is written, thought, asked and in code, at WCAG's contrast of 4.5."""
    script.thought, script.text = "hm", "It is `a` [link](https://example.com).\n\n```python\nx = 1\n```"
    ask(page, "Hi")
    seen = set()
    for dark in (False, True):
        page.size(1200, 800, dark=dark)
        page.wait(f"matchMedia('(prefers-color-scheme: dark)').matches === {json.dumps(dark)}")
        for selector in READ:
            assert contrast(page, selector) >= 4.5, (dark, selector)
        seen.add(page.value("getComputedStyle(document.body).backgroundColor"))
        page.press("s", "KeyS", ALT)
        assert contrast(page, "dialog [name=system]") >= 4.5, dark
        page.press("Escape")
    assert len(seen) == 2
    assert luminance(page, "getComputedStyle(document.body).backgroundColor") < 0.05


CHANNELS = """(color => { const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
context.fillStyle = color; context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data] })"""
BEHIND = """(node => { const color = node => getComputedStyle(node).backgroundColor;
while (/, 0\\)$/.test(color(node))) node = node.parentElement; return color(node) })"""


def luminance(page: Browser, color: str) -> float:
    """WCAG's, of what an expression of JavaScript gives."""
    *channels, opacity = page.value(f"{CHANNELS}({color})")
    assert opacity == 255, color
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in channels)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(page: Browser, selector: str) -> float:
    """WCAG's contrast of a text with what is behind it."""
    node = f"document.querySelector({json.dumps(selector)})"
    texts = sorted(luminance(page, color) for color in (f"getComputedStyle({node}).color", f"{BEHIND}({node})"))
    return (texts[1] + 0.05) / (texts[0] + 0.05)


def test_a_key_is_asked_for(script: Script, browser: Browser) -> None:
    script.key = "secret"
    with running(script.app()) as url:
        browser.size(1200, 800)
        browser.open(url)
        browser.wait("document.querySelector('dialog').open")
        assert "API key" in browser.value("document.querySelector('#problem').innerText")
        browser.write("secret")
        browser.press("Enter")
        browser.wait("models.length === 2")
        browser.open("about:blank#left")


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_lies_outside_the_screen(page: Browser, script: Script, width: int) -> None:
    script.text = EVERYTHING + "\n" + "long" * 100 + "\n```\n\n" + "wide" * 60
    page.size(width, 740)
    page.press("c", "KeyC", ALT)
    ask(page, "x" * 200)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("$('scroll').scrollWidth") <= width
    boxes = (
        "[...document.querySelectorAll('header, #composer, .bubble, .icon, #go')].map(x => x.getBoundingClientRect())"
    )
    inside = page.value(f"{boxes}.filter(box => box.width).map(box => [box.left, box.right])")
    in_panes = page.value("document.querySelectorAll('.answers.two .icon').length")
    assert sum(left >= 0 and right <= width for left, right in inside) >= len(inside) - in_panes
    composer = page.value("$('composer').getBoundingClientRect().bottom")
    assert composer <= 740
