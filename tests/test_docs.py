"""The pages: plain words, short sentences, flags that exist, and commands that run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"))
)
ENGLISH = [page for page in PAGES if ".zh." not in page]

NOT_PLAIN = r"no multiples? of|beside|parted by|anew|mend(s|ed)?|heeds?|heeded"
NOT_IN_PAGES = re.compile(rf"\b({NOT_PLAIN}|[B-J][1-9])\b")  # also codes of a table that is not in the repository
NOT_IN_CODE = re.compile(rf"(?<![a-z])({NOT_PLAIN})(?![a-z])", re.IGNORECASE)  # in a part of a name, too
SOURCES = [path for folder in ("src", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
MOST_WORDS = 20
CODE = re.compile(r"^ *```.*?^ *```|<!--.*?-->|^:::.*?(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
# Flags of other programs that the pages name.
FOREIGN_FLAGS = {"--max-restarts", "--rdzv-backend", "--use-checkpoint-args"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def sentences(page: str) -> list[str]:
    """What a reader reads as one: a sentence of a paragraph, of a list's item, or of a table's cell."""
    blocks: list[str] = []
    for line in CODE.sub("\n\n", text(page)).splitlines():
        words = line.strip()
        if words.startswith("|"):
            blocks += ["", *words.strip("|").split("|"), ""]
        elif not words or words.startswith(("#", "- ", "* ")) or re.match(r"\d+\. ", words):
            blocks += ["", words.lstrip("#-* ")]
        else:
            blocks[-1:] = [f"{blocks[-1]} {words}"] if blocks else [words]
    plain = [re.sub(r"`[^`]*`|\]\([^)]*\)", "x", block) for block in blocks]
    return [sentence for block in plain for sentence in re.split(r"(?<=[.!?:;])[*_]*\s+", block) if sentence.strip()]


@pytest.mark.parametrize("page", ENGLISH)
def test_words_are_plain(page: str) -> None:
    prose = re.sub(r"`[^`\n]*`", "", CODE.sub("", text(page)))
    assert [match[0] for match in NOT_IN_PAGES.finditer(prose)] == []


def test_words_of_the_code_are_plain() -> None:
    found = [
        f"{path}:{number}: {match[0]}"
        for path in SOURCES
        if path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in NOT_IN_CODE.finditer(line)
    ]
    assert found == []


@pytest.mark.parametrize("page", ENGLISH)
def test_sentences_are_short(page: str) -> None:
    assert [sentence for sentence in sentences(page) if len(sentence.split()) > MOST_WORDS] == []


@pytest.mark.parametrize("page", ENGLISH)
def test_flags_exist(page: str, known_words: set[str]) -> None:
    flags = {flag for flag in FLAG.findall(text(page)) if flag not in FOREIGN_FLAGS}
    names = {flag: flag.strip("-").replace("-", "_") for flag in flags}
    unknown = [flag for flag, name in names.items() if not {name, name.removeprefix("no_")} & known_words]
    assert sorted(unknown) == []


@pytest.fixture(scope="module")
def known_words() -> set[str]:
    """Every name in the code, with dashes as underscores."""
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    words = {word for file in files for word in re.findall(r"[A-Za-z0-9_-]+", file.read_text(encoding="utf-8"))}
    return {word.strip("-").replace("-", "_") for word in words}


@pytest.mark.slow("users")
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a short quickstart's files: the `bash` blocks of docs/guide, in the order of the site, and the Python page."""
    for name in ("torch", "mindspore"):
        require_framework(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["quickstart", "--pretrain-iters", "2", "--finetune-iters", "2", "--questions", "2"]) == 0
    pages = re.findall(r"guide/\w+\.md", text("mkdocs.yml"))
    commands = [block for page in pages for block in blocks("bash", f"docs/{page}")]
    assert len(commands) > 20
    python = f'"{sys.executable}"'
    run("bash", "-c", "\n".join(["set -eux", f'tandem() {{ {python} -m tandem "$@"; }}', *commands]))
    run(sys.executable, "-c", "".join(blocks("python", "docs/reference/python.md")))


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
