"""Malformed rows of every kind: each is named with its place, none crashes, nothing is half written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_toys import byte_tokenizer
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]}
RECORDS: dict[str, Any] = {
    "GeneralPretrainHandler": {"text": "some text"},
    "AlpacaPretrainHandler": {"instruction": "I", "input": "x", "output": "O"},
    "SharegptPretrainHandler": {"conversations": [{"from": "human", "value": "U"}]},
    "AlpacaStyleInstructionHandler": {"instruction": "I", "input": "x", "output": "O"},
    "SharegptStyleInstructionHandler": {
        "conversations": [
            {"from": "human", "value": "U"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "A"},
        ]
    },
    "OpenAIInstructionHandler": {
        "messages": [CHAT[0], CALL, {"role": "tool", "content": "3"}, CHAT[1]],
        "tools": [{"name": "f"}],
    },
    "AlpacaStylePairwiseHandler": {"instruction": "I", "input": "x", "chosen": "good", "rejected": "bad"},
    "SharegptStylePairwiseHandler": {
        "conversations": [{"from": "human", "value": "U"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "PreferenceHandler": {
        "prompt": [CHAT[0]],
        "chosen": [CALL, {"role": "tool", "content": "3"}, CHAT[1]],
        "rejected": "x",
    },
    "OpenAIUnpairedHandler": {"messages": CHAT, "label": False},
}

MARKS = ["\ue0000\ue001", "\ue000999\ue001"]  # as the prompt type chat_template puts them into a text
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["<think>", "</think>", "<|im_end|>", "\ue0000\ue001", "\ue000999\ue001", "{content}", "{% raw %}", "\x00"]
    ),
)
junk = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A record of which some parts are replaced, missing, doubled or of another kind."""
    fate = draw(st.sampled_from(["keep"] * 6 + ["junk"]))
    if fate == "junk":
        return draw(junk)
    if isinstance(value, dict):
        kept = {key: draw(changed(inner)) for key, inner in value.items() if draw(st.integers(0, 9))}
        return kept | (
            draw(st.dictionaries(st.text(max_size=5), junk, max_size=1)) if not draw(st.integers(0, 4)) else {}
        )
    if isinstance(value, list):
        entries = [draw(changed(inner)) for inner in value if draw(st.integers(0, 9))]
        return entries * draw(st.sampled_from([1, 1, 1, 2]))
    return value


@st.composite
def lines_of(draw: st.DrawFn, record: Any) -> list[bytes]:
    """Lines: good records, changed ones, cut ones, and bytes of any kind."""
    good = json.dumps(record).encode()
    line = st.one_of(
        st.just(good),
        changed(record).map(lambda value: json.dumps(value).encode()),
        st.integers(0, len(good)).map(lambda end: good[:end]),
        st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b" ")),
        st.integers(900, 1100).map(lambda depth: b'{"text": ' + b"[" * depth + b"]" * depth + b"}"),
    )
    return [good, *draw(st.lists(line, max_size=5))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("fuzz")
    byte_tokenizer(root / "tokenizer", chat_template=TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # hundreds of small runs; no machine fails meanwhile
        yield root


@pytest.mark.parametrize("prompt_type", ["qwen3", "chat_template"])
@pytest.mark.parametrize("handler", RECORDS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_row_is_used_or_named(handler: str, prompt_type: str, data: st.DataObject, folder: Path) -> None:
    plain = handler.endswith("PretrainHandler")
    if plain and prompt_type != "qwen3":
        pytest.skip("plain text has no template")
    check(data.draw(lines_of(RECORDS[handler])), handler, None if plain else prompt_type, folder)


def clear(folder: Path) -> None:
    for old in [*folder.glob("out*"), *folder.glob("file*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def check(lines: list[bytes], handler: str, prompt_type: str | None, folder: Path) -> None:
    clear(folder)
    source = folder / "in.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    options = {"handler_name": handler, "prompt_type": prompt_type, "seq_length": 400 if prompt_type else None}
    given_options = PreprocessOptions((str(source),), str(folder / "out"), str(folder / "tokenizer"), **options)  # type: ignore[arg-type]
    summary = preprocess(PreprocessOptions(**{**vars(given_options), "on_bad": "skip"}))
    assert summary.documents == len(lines)
    assert summary.kept >= 1
    assert summary.kept + summary.rejected + sum(summary.dropped.values()) == len(lines)
    rejects = Path(summary.rejects).read_text().splitlines() if summary.rejects else []
    places = [re.match(rf"{re.escape(str(source))}:(\d+): .", json.loads(line)["reason"]) for line in rejects]
    assert len(places) == summary.rejected
    assert all(places)
    for prefix in summary.prefixes.values():
        assert len(IndexedDataset(prefix)) == summary.kept

    clear(folder)
    if not rejects:
        preprocess(given_options)
        return
    first = places[0]
    assert first is not None
    with pytest.raises(UserError, match=f":{first.group(1)}: "):
        preprocess(given_options)
    assert not list(folder.glob("out*"))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('[]{}",:\\ \n1at'), max_size=40).map(str.encode),
        st.sampled_from([b"PAR1", b"ARROW1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"text\n"]).flatmap(
            lambda head: st.binary(max_size=30).map(lambda tail: head + tail)
        ),
    ),
)
@example(suffix=".csv", content=b'text\n"')
@example(suffix=".json", content=b'[{"text": "a"}, ')
def test_damaged_files_are_named(suffix: str, content: bytes, folder: Path) -> None:
    clear(folder)
    source = folder / f"file{suffix}"
    source.write_bytes(content)
    options = PreprocessOptions((str(source),), str(folder / "out"), str(folder / "tokenizer"))
    error = ""
    try:
        preprocess(PreprocessOptions(**{**vars(options), "handler_name": "GeneralPretrainHandler", "on_bad": "skip"}))
    except UserError as caught:
        error = str(caught)
    written = {path.name for path in folder.glob("out*")} - {"out.rejects.jsonl"}  # which says why nothing is left
    assert written == set() if error else "out.json" in written
    assert not error or str(source) in error


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "tools": DEEP},
        {"messages": CHAT, "tools": '[{"name": "\\ud800"}]'},
        {"messages": [CHAT[0], {**CALL, "tool_calls": [{"name": MARKS[1], "arguments": "{}"}]}, *CHAT]},
        {"messages": [CHAT[0], {**CALL, "tool_calls": [{"name": "f", "arguments": MARKS[0]}]}, *CHAT]},
        {"messages": [CHAT[0], {**CALL, "tool_calls": [{"name": "f", "arguments": DEEP}]}, *CHAT]},
        {"messages": [{**CHAT[0], "content": MARKS[1]}, CHAT[1]]},
    ],
)
@pytest.mark.parametrize("prompt_type", ["qwen3", "chat_template"])
def test_rows_made_to_hurt(record: dict[str, Any], prompt_type: str, folder: Path) -> None:
    lines = [json.dumps(RECORDS["OpenAIInstructionHandler"]).encode(), json.dumps(record).encode()]
    check(lines, "OpenAIInstructionHandler", prompt_type, folder)
