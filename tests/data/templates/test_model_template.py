"""The prompt type `chat_template`: the model's own template, byte for byte, and what of it is trained."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.batch import IGNORE
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.handlers.conversations import OpenAIInstructionHandler
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.templates.catalog import get_template, template_from_entry
from tandem.data.templates.messages import Message, Template, ToolCall, Turn
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer(shared_data / "qwen3-0.6b")


def text_of(turns: list[Turn]) -> str:
    return "".join(piece for turn in turns for piece in (*turn.source, *turn.target))


def chat(messages: list[Message]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for m in messages:
        calls = [{"function": {"name": c.name, "arguments": json.loads(c.arguments)}} for c in m.tool_calls]
        entries.append({"role": m.role, "content": m.content})
        entries[-1] |= {"reasoning_content": m.reasoning} if m.reasoning else {}
        entries[-1] |= {"tool_calls": calls} if calls else {}
    return entries


@pytest.mark.parametrize("arguments", ['{"a":1}', '{"a": "\\u00e9"}', "{}"])
@pytest.mark.parametrize("mode", [None, True, False])
def test_arguments_given_as_text_stay_that_text(tokenizer: Tokenizer, arguments: str, mode: bool | None) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    turns = get_template("chat_template", mode, tokenizer).turns(
        OpenAIInstructionHandler().messages({"messages": messages})
    )
    flags = {} if mode is None else {"enable_thinking": mode}
    expected = tokenizer.apply_chat_template(messages, **flags)
    assert arguments in expected
    assert text_of(turns) == expected


FORMS = {
    "quotes a text again": "{{ c.function.arguments | tojson }}",
    "writes objects as Python does": "{{ c.function.arguments }}",
    "cannot write an object": "{{ '' + c.function.arguments }}",
    "writes each argument": "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}",
}


@pytest.mark.parametrize(
    ("form", "expected"),
    [(form, "<a>1" if form == "writes each argument" else '{"a": 1}') for form in FORMS],
)
def test_arguments_reach_a_template_in_a_form_that_it_can_write(form: str, expected: str, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{FORMS[form]}{{% endfor %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = get_template(
        "chat_template", tokenizer=Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=source))
    )
    for arguments in ('{"a": 1}', {"a": 1}):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
        assert trained(template, *OpenAIInstructionHandler().messages(record)) == [f"{expected}<|im_end|>"]


def trained(template: Template, *messages: Message) -> list[str]:
    return ["".join(turn.target) for turn in template.turns(messages) if turn.target]


def test_what_is_trained(tokenizer: Tokenizer) -> None:
    template = get_template("chat_template", tokenizer=tokenizer)
    one, two = Message("user", "1"), Message("user", "2")
    assert trained(template, one, Message("assistant", "A")) == ["A<|im_end|>"]  # the inserted empty thought is not
    assert trained(template, one, Message("assistant", "A", "hm")) == ["<think>\nhm\n</think>\n\nA<|im_end|>"]
    inline = Message("assistant", "<think>\nhm\n</think>\n\nA")
    assert trained(template, one, inline) == ["<think>\nhm\n</think>\n\nA<|im_end|>"]
    assert trained(template, one, inline, two, Message("assistant", "B")) == ["A<|im_end|>", "B<|im_end|>"]
    call = Message("assistant", "", "", (ToolCall("f", '{"a": 1}'),))
    answers = trained(template, one, call, Message("tool", "3"), Message("assistant", "B"))
    assert answers == ['<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "B<|im_end|>"]


def test_an_answer_that_its_data_leave_out_is_not_trained(tokenizer: Tokenizer) -> None:
    template = get_template("chat_template", tokenizer=tokenizer)
    messages = [Message("user", "1"), Message("assistant", "BAD"), Message("user", "2"), Message("assistant", "B")]
    weighed = [message._replace(trained=message.content != "BAD") for message in messages]
    assert trained(template, *weighed) == ["B<|im_end|>"]
    assert text_of(template.turns(weighed)) == text_of(template.turns(messages))


def test_variables_of_a_record_reach_the_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [Message("user", "1"), Message("assistant", "A")]
    template = get_template("chat_template", tokenizer=tokenizer)
    thinks = template.with_variables({"enable_thinking": False})
    assert thinks is template.with_variables({"enable_thinking": False})
    assert "<think>" in thinks.generation_prompt(messages[:1])[0]
    own = CHATML.replace("{% for", "{{ name | default('') }}{% for", 1)
    named = get_template(
        "chat_template", tokenizer=Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=own))
    )
    assert text_of(named.with_variables({"name": "Ada"}).turns(messages)) == "Ada" + text_of(named.turns(messages))
    with pytest.raises(UserError, match="come from the data"):
        named.with_variables({"messages": []})


def test_only_the_last_answer_though_text_follows_it(tokenizer: Tokenizer) -> None:
    template = get_template("chat_template", tokenizer=tokenizer)
    messages = [Message("user", "1"), Message("assistant", "A"), Message("user", "2"), Message("assistant", "B")]
    turns = template.last_answer(messages)
    assert ["".join(turn.target) for turn in turns if turn.target] == ["B<|im_end|>"]
    assert text_of(turns) == text_of(template.turns(messages))


@pytest.mark.parametrize("mode", [None, True, False])
@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("hm\n</think>\n\nA", "<think>\nhm\n</think>\n\nA<|im_end|>"),  # the prompt held the beginning
        ("<think>\na\n</think>b<think>c</think>\nA", "<think>\na\n</think>\n\nA<|im_end|>"),
        ("B <think>hm</think>A", "<think>\nhm\n</think>\n\nA<|im_end|>"),
        ("<think>\n\n</think>\n\nA", "A<|im_end|>"),
        ("<think>never ends", "<think>never ends<|im_end|>"),
        ("A <think>", "A <think><|im_end|>"),
        ("<think>hm</think>", "<think>\nhm\n</think>\n\n<|im_end|>"),
    ],
)
def test_thoughts_in_the_content(tokenizer: Tokenizer, mode: bool | None, content: str, answer: str) -> None:
    messages = [Message("user", "1"), Message("assistant", content)]
    template = get_template("chat_template", mode, tokenizer)
    flags = {} if mode is None else {"enable_thinking": mode}
    assert text_of(template.turns(messages)) == tokenizer.apply_chat_template(chat(messages), **flags)
    assert trained(template, *messages) == [answer]
    more = [*messages, Message("user", "2"), Message("assistant", content)]
    assert text_of(template.turns(more)) == tokenizer.apply_chat_template(chat(more), **flags)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_thoughts_in_the_content_of_a_template_that_knows_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=CHATML))
    template = get_template("chat_template", tokenizer=tokenizer)
    messages = [Message("user", "1"), Message("assistant", "<think>\nhm\n</think>\n\nA")]
    assert text_of(template.turns(messages)) == tokenizer.apply_chat_template(chat(messages))
    assert trained(template, *messages) == ["<think>\nhm\n</think>\n\nA<|im_end|>"]


def test_an_empty_reasoning_and_a_thought_in_the_content(tokenizer: Tokenizer) -> None:
    message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA", "reasoning_content": ""}
    messages = [{"role": "user", "content": "1"}, message]
    turns = get_template("chat_template", None, tokenizer).turns(
        OpenAIInstructionHandler().messages({"messages": messages})
    )
    assert text_of(turns) == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n", "hm</think>"])
def test_a_thought_before_a_call(tokenizer: Tokenizer, content: str) -> None:
    call = ToolCall("f", "{}")
    messages = [Message("user", "1"), Message("assistant", content, None, (call,))]
    for more in ([], [Message("tool", "r"), Message("assistant", "A")]):
        turns = get_template("chat_template", None, tokenizer).turns([*messages, *more])
        assert text_of(turns) == tokenizer.apply_chat_template(chat([*messages, *more]))


LAST = "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
SPLIT = "{{ m.content.split('</think>')[-1] }}"
BEGUN = "{% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"


@pytest.mark.parametrize(
    ("answer", "reasoning", "expected"),
    [
        (LAST, None, ["\n\nA<|im_end|>", "<think>\nhm\n</think>\n\nA<|im_end|>"]),
        (SPLIT, None, ["\n\nA<|im_end|>", "\n\nA<|im_end|>"]),
        (BEGUN, "hm", ["A<|im_end|>", "hm\n</think>\n\nA<|im_end|>"]),
    ],
    ids=["strips what is past", "splits and strips no lines", "begins a thought in its prompt"],
)
def test_templates_that_treat_thoughts_in_other_ways(
    tmp_path: Path, answer: str, reasoning: str | None, expected: list[str]
) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% else %}"
        f"{answer}{{% endif %}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + ("<think>\n" if reasoning else "") + "{% endif %}"
    )
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=source))
    template = get_template("chat_template", tokenizer=tokenizer)
    content = "A" if reasoning else "<think>\nhm\n</think>\n\nA"
    messages = [Message("user", "1"), Message("assistant", content, reasoning)] * 2
    assert text_of(template.turns(messages)) == tokenizer.apply_chat_template(chat(messages))
    assert trained(template, *messages) == expected
    assert template.answer_header == "<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_ends_with_the_end_token_that_the_template_writes(tmp_path: Path) -> None:
    """The tokenizer of a model that was only pretrained names the end of documents."""
    folder = byte_tokenizer(tmp_path / "tokenizer", chat_template=CHATML, eos_token="<|endoftext|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    template = get_template("chat_template", tokenizer=Tokenizer(folder))
    assert template.stop_word == "<|im_end|>"
    messages = [Message("user", "1"), Message("assistant", "A"), Message("user", "2"), Message("assistant", "B")]
    assert trained(template, *messages) == ["A<|im_end|>", "B<|im_end|>"]


def test_an_answer_without_an_end_of_its_own_is_refused(tmp_path: Path) -> None:
    """Otherwise the user's next message would be trained with it."""
    source = CHATML + "{% if messages[-1].role == 'assistant' %}<|endoftext|>{% endif %}"
    folder = byte_tokenizer(tmp_path / "tokenizer", chat_template=source, eos_token="<|endoftext|>")
    template = get_template("chat_template", tokenizer=Tokenizer(folder))
    messages = [Message("user", "1"), Message("assistant", "A"), Message("user", "2"), Message("assistant", "B")]
    with pytest.raises(UserError, match=r"<\|endoftext\|>.*eos_token_id"):
        template.turns(messages)


def test_a_template_that_begins_no_answer_is_refused(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=source))
    with pytest.raises(UserError, match="cannot find the answers"):
        get_template("chat_template", tokenizer=tokenizer).turns([Message("user", "1"), Message("assistant", "A")])


DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.mark.parametrize("train_turns", ["all", "last"])
def test_a_cut_prompt_keeps_the_header_that_its_template_writes(tmp_path: Path, train_turns: str) -> None:
    folder = byte_tokenizer(tmp_path / "tokenizer", chat_template=DEEPSEEK)
    talk = [("user", "1"), ("assistant", "A"), ("user", "q" * 99), ("assistant", "B")]
    record = {"messages": [{"role": role, "content": content} for role, content in talk]}
    source = write_jsonl(tmp_path / "x.jsonl", record)
    options = PreprocessOptions((str(source),), str(tmp_path / "x"), str(folder), prompt_type="chat_template")
    preprocess(dataclasses.replace(options, seq_length=60, train_turns=train_turns))
    preprocess(dataclasses.replace(options, output_prefix=str(tmp_path / "whole"), train_turns=train_turns))
    tokenizer = Tokenizer(folder)
    header = tokenizer.encode("<A>")
    for prefix in ("x", "whole"):
        text = tokenizer.decode(SFTDataset(tmp_path / prefix, "train", "1", None, 59, 1, header=header)[0].tokens)
        assert re.fullmatch(r"<U>1<A>A<\|im_end\|><U>q+<A>B<\|im_end\|>", text)
        assert len(tokenizer.encode(text)) == 59


GENERATION = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{%- generation -%}{{ m.content }}!"
    "{% if loop.last %}<|im_end|>{% endif %}{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
    "{%- endfor %}"
)


def test_the_templates_own_generation_tags_say_what_is_trained(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(tmp_path / "tokenizer", chat_template=GENERATION))
    template = get_template("chat_template", tokenizer=tokenizer)
    talk = [("user", "1"), ("assistant", "\ue002A"), ("user", "2"), ("assistant", " B")]
    messages = [Message(role, content) for role, content in talk]
    assert trained(template, *messages) == ["\ue002A!", " B!<|im_end|>"]
    for number, left in ((1, [" B!<|im_end|>"]), (3, ["\ue002A!"])):
        weighed = [message._replace(trained=i != number) for i, message in enumerate(messages)]
        assert trained(template, *weighed) == left
    assert text_of(template.turns(messages)) == tokenizer.apply_chat_template(chat(messages))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer").apply_chat_template(
        chat(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids = [tokenizer.encode(piece) for turn in template.turns(messages) for piece in (*turn.source, *turn.target)]
    mask = [
        flag
        for turn in template.turns(messages)
        for flag, side in ((0, turn.source), (1, turn.target))
        for piece in side
        for _ in tokenizer.encode(piece)
    ]
    assert [i for piece in ids for i in piece] == theirs["input_ids"]
    assert mask == theirs["assistant_masks"]


words = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001<"), max_size=12)
thoughts = st.sampled_from(["", "hm", "so\n\nthen"])
turns_of_chat = st.lists(st.tuples(words, thoughts, words, st.booleans()), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(system=words, turns=turns_of_chat, mode=st.sampled_from([None, True, False]), offers_tools=st.booleans())
def test_equals_apply_chat_template(
    system: str,
    turns: list[tuple[str, str, str, bool]],
    mode: bool | None,
    offers_tools: bool,
    tokenizer: Tokenizer,
) -> None:
    messages = [Message("system", system)] if system else []
    for question, thought, answer, calls in turns:
        messages.append(Message("user", question))
        if calls:
            messages += [Message("assistant", answer, thought, (ToolCall("f", '{"a": "é"}'),)), Message("tool", "r")]
        messages.append(Message("assistant", answer, thought))
    tools = [{"name": "f", "description": "x"}] if offers_tools else None
    template = get_template("chat_template", mode, tokenizer)
    ours = template.turns(messages, [json.dumps(tool) for tool in tools or []])
    flags = {} if mode is None else {"enable_thinking": mode}
    assert text_of(ours) == tokenizer.apply_chat_template(chat(messages), tools=tools, **flags)
    targets = ["".join(turn.target) for turn in ours if turn.target]
    assert len(targets) == sum(message.role == "assistant" for message in messages)
    assert all(target.endswith("<|im_end|>") and target.count("<|im_end|>") == 1 for target in targets)
    prompt = tokenizer.apply_chat_template(chat(messages[:-1]), add_generation_prompt=True, **flags)
    assert template.generation_prompt(messages[:-1]) == (prompt,)


def test_preprocessed_and_named_in_the_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
    source = write_jsonl(tmp_path / "x.jsonl", record)
    options = PreprocessOptions((str(source),), str(tmp_path / "x"), str(tokenizer.folder), prompt_type="chat_template")
    preprocess(options)
    sample = SFTDataset(tmp_path / "x", "train", "1", None, 100, seed=0)[0]
    whole = tokenizer.encode(tokenizer.apply_chat_template(record["messages"]))
    assert sample.tokens.tolist() == whole[: len(sample.tokens)]
    assert tokenizer.decode(sample.labels[sample.labels != IGNORE].tolist()) == "A<|im_end|>"
    entry = json.loads((tmp_path / "x.json").read_text())["template"]
    again = template_from_entry(entry, tokenizer)
    assert again is not None
    assert (again.name, again.sha256) == ("chat_template", entry["sha256"])
    with pytest.raises(UserError, match="chat_template needs a tokenizer"):
        template_from_entry(entry, None)


def test_templates_that_cannot_tell_are_refused(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "tokenizer")
    messages = [Message("user", "U"), Message("assistant", "A")]
    with pytest.raises(UserError, match="needs the model's chat template"):
        get_template("chat_template", tokenizer=Tokenizer(folder))
    for source, reason in [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "cannot find the messages"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' if add_generation_prompt }}",
            "cannot find the answers",
        ),
    ]:
        (folder / "chat_template.jinja").write_text(source)
        with pytest.raises(UserError, match=reason):
            get_template("chat_template", tokenizer=Tokenizer(folder)).turns([Message("user", "u"), *messages[1:]])


@pytest.mark.parametrize("reasoning", ["", "\n", "\n\n"])
def test_a_thought_of_line_ends_is_none(tokenizer: Tokenizer, reasoning: str) -> None:
    messages = [Message("user", "q"), Message("assistant", "ans", reasoning=reasoning)]
    turns = get_template("chat_template", None, tokenizer).turns(messages)
    assert turns[0].target == ("ans<|im_end|>",)
    assert text_of(turns) == tokenizer.apply_chat_template(chat(messages))
