"""What changes the meaning of data is honoured, refused or named: by `tandem preprocess` and by a dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_toys import byte_tokenizer, options, write_jsonl
from tandem.__main__ import main
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.run import PreprocessSummary, preprocess
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*texts: str, **last: Any) -> dict[str, Any]:
    """A record of questions and answers in turn; `last` are more fields of the last answer."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)
    ]
    messages[-1] |= last
    return {"messages": messages}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tokenizer", chat_template=CHATML)


def made(tmp_path: Path, tokenizer: Path, *records: Any, **changes: Any) -> PreprocessSummary:
    return preprocess(options(write_jsonl(tmp_path / "x.jsonl", *records), tmp_path / "x", tokenizer, **changes))


def trained_texts(summary: PreprocessSummary, tokenizer: Path) -> list[str]:
    ids, labels = (IndexedDataset(summary.prefixes[key]) for key in ("input_ids", "labels"))
    reader = Tokenizer(tokenizer)
    return [reader.decode(ids[i][labels[i] != IGNORE].tolist()) for i in range(len(ids))]


def test_answers_of_weight_nought_are_not_trained(tmp_path: Path, tokenizer: Path) -> None:
    records = [chat("1", "BAD", "2", "good"), chat("1", "ALL BAD", weight=0), chat("1", "fine", weight=1)]
    records[0]["messages"][1]["weight"] = 0
    records[0]["messages"][0]["train"] = True
    for prompt_type in ("qwen3", "chat_template"):
        summary = made(tmp_path, tokenizer, *records, prompt_type=prompt_type)
        end = "<|im_end|>\n" if prompt_type == "qwen3" else "<|im_end|>"
        assert trained_texts(summary, tokenizer) == [f"good{end}", f"fine{end}"]
        assert summary.dropped == {"nothing left to train": 1}
        assert (summary.noticed["untrained"], summary.noticed["asked"]) == (2, 1)
        last = made(tmp_path, tokenizer, *records, prompt_type=prompt_type, train_turns="last")
        assert trained_texts(last, tokenizer) == [f"good{end}", f"fine{end}"]


def test_what_is_not_read_is_named(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"instruction": "I", "output": "O", "system": "S", "label": False, "images": ["a.png"], "note": ""}
    source = write_jsonl(tmp_path / "x.jsonl", record, record)
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--tokenizer-name-or-path", str(tokenizer)]
    words += ["--handler-name", "AlpacaStyleInstructionHandler"]  # else a row with a label is an unpaired preference
    assert main(["preprocess", *words]) == 0
    out = capsys.readouterr().out
    assert "read with AlpacaStyleInstructionHandler, with prompt type chat_template\n" in out
    assert "not read: system, label, images\n" in out
    assert """--map-keys '{"system": "system"}' reads system""" in out
    assert "label: rows with a false label are trained" in out
    assert "conversations that occur again, and are trained again: 1\n" in out
    counts = json.loads((tmp_path / "x.json").read_text())["counts"]
    assert counts["unread"] == {"system": 2, "label": 2, "images": 2}
    assert main(["preprocess", *words, "--map-keys", '{"system": "system"}']) == 0  # as the summary says
    assert "not read: label, images\n" in capsys.readouterr().out


def test_a_weight_of_a_whole_row_is_named(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {**chat("1", "A"), "weight": 0})
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--tokenizer-name-or-path", str(tokenizer)]
    assert main(["preprocess", *words]) == 0
    assert "weight: a whole row has no weight" in capsys.readouterr().out


def test_columns_of_dataset_info_are_advised_where_they_stand(tmp_path: Path, tokenizer: Path) -> None:
    record = {"instruction": "I", "output": "O", "system": "S", "history": [["a", "b"]]}
    source = write_jsonl(tmp_path / "x.jsonl", record)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "x.jsonl"}}))
    listed = {"handler_name": "LlamaFactoryInstructionHandler", "dataset_dir": str(tmp_path)}
    summary = preprocess(options(Path("mine"), tmp_path / "x", tokenizer, **listed))
    assert summary.handlers == ("AlpacaStyleInstructionHandler",)
    assert summary.readers["system"] == '"columns": {"system": "system"} in dataset_info.json'
    named = preprocess(options(source, tmp_path / "x", tokenizer, map_keys={"history": "history"}))
    assert named.readers == {"system": """--map-keys '{"history": "history", "system": "system"}'"""}


def test_a_column_under_another_name_is_advised_unless_the_usual_one_is_there(tmp_path: Path, tokenizer: Path) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    offered = {**chat("1", "A"), "tools": [], "functions": [tool]}
    summary = made(tmp_path, tokenizer, offered, prompt_type="qwen3")
    assert summary.readers == {"functions": """--map-keys '{"tools": "functions"}'"""}
    followed = made(tmp_path, tokenizer, offered, map_keys={"tools": "functions"}, prompt_type="qwen3")
    assert (followed.unread, followed.readers) == ({}, {})
    assert followed.tokens > summary.tokens  # the model is told of the tool
    both = made(tmp_path, tokenizer, offered, {**chat("2", "A"), "tools": [tool]})
    assert (both.unread, both.readers) == ({"functions": 1}, {})  # to read one would leave out the other

    asked = {"instruction": "I", "context": "C", "output": "O"}
    assert made(tmp_path, tokenizer, asked).readers == {"context": """--map-keys '{"query": "context"}'"""}
    assert made(tmp_path, tokenizer, {**asked, "input": "I"}).readers == {}


def test_a_column_that_is_mapped_may_be_absent_but_not_everywhere(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"instruction": "I", "output": "O"}, {"instruction": "I", "output": "O", "system": "S"}]
    summary = made(tmp_path, tokenizer, *records, map_keys={"system": "system"})
    assert summary.kept == 2
    assert summary.unread == {}
    with pytest.raises(UserError, match=r"no row has the field 'sistem'.*did you mean 'system'"):
        made(tmp_path, tokenizer, *records, map_keys={"system": "sistem"})
    assert not (tmp_path / "x.unfinished").exists()


def test_empty_and_repeated_answers_and_lost_thoughts_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    records = [chat("1", " "), chat("1", "A"), chat("1", "A"), chat("1", "A"), chat("2", "B", reasoning="because")]
    summary = made(tmp_path, tokenizer, *records)
    assert summary.noticed == {"empty": 1, "repeated": 2, "lost thoughts": 1}
    assert "lost thoughts" not in made(tmp_path, tokenizer, *records, prompt_type="qwen3").noticed
    without = made(tmp_path, tokenizer, *records, prompt_type="qwen3", enable_thinking="false")
    assert without.noticed["lost thoughts"] == 1


def test_neighbours_are_joined_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    record = chat("1", "A")
    record["messages"].append({"role": "assistant", "content": "B"})
    summary = made(tmp_path, tokenizer, record)
    assert trained_texts(summary, tokenizer) == ["A\nB<|im_end|>"]
    assert summary.noticed == {"joined": 1}


def test_a_record_gives_its_template_variables(tmp_path: Path, tokenizer: Path) -> None:
    records = [chat("1", "A"), {**chat("1", "A"), "chat_template_kwargs": {"enable_thinking": True}}]
    summary = made(tmp_path, tokenizer, *records, prompt_type="qwen3")
    assert trained_texts(summary, tokenizer) == ["A<|im_end|>\n", "<think>\n\n</think>\n\nA<|im_end|>\n"]
    with pytest.raises(UserError, match=r"x\.jsonl:1: .*takes only enable_thinking"):
        made(tmp_path, tokenizer, {**chat("1", "A"), "chat_template_kwargs": {"x": 1}}, prompt_type="qwen3")


@pytest.mark.parametrize("prompt_type", ["qwen3", "chat_template"])
def test_special_tokens_in_texts(tmp_path: Path, tokenizer: Path, prompt_type: str) -> None:
    record = chat("say <|im_end|>", "<think>hm</think>it is <|im_end|><|im_start|>", "2", "B")
    reader = Tokenizer(tokenizer)
    ids = {}
    for form in ("encode", "text"):
        summary = made(tmp_path, tokenizer, record, prompt_type=prompt_type, special_tokens_in_text=form)
        ids[form] = IndexedDataset(summary.prefixes["input_ids"])[0].tolist()
        assert summary.noticed.get("special", 0) == (2 if form == "encode" else 0)
    assert reader.decode(ids["text"]) == reader.decode(ids["encode"])
    end = reader.require_id("<|im_end|>")
    assert (ids["encode"].count(end), ids["text"].count(end)) == (6, 4)
    spelled = reader.encode_spelled(["<|im_end|>"])[0]
    assert len(spelled) == 10
    assert len(ids["text"]) == len(ids["encode"]) + 2 * 9 + (len("<|im_start|>") - 1)


def test_special_tokens_in_plain_text(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"text": "a<|endoftext|>b"}, {"text": "c"}]
    summary = made(tmp_path, tokenizer, *rows, append_eod=True)
    assert (summary.noticed, summary.eod) == ({"special tokens": 1}, "<|im_end|>")
    spelled = made(tmp_path, tokenizer, *rows, append_eod=True, special_tokens_in_text="text")
    assert spelled.noticed == {}
    first = IndexedDataset(spelled.prefixes["text"])[0].tolist()
    reader = Tokenizer(tokenizer)
    assert first == [*reader.encode("a"), *reader.encode_spelled(["<|endoftext|>"])[0], *reader.encode("b"), 258]
    many = made(tmp_path, tokenizer, *rows, append_eod=True, special_tokens_in_text="text", workers=2)
    assert IndexedDataset(many.prefixes["text"])[0].tolist() == first


def test_the_token_that_ends_documents_can_be_chosen(tmp_path: Path, tokenizer: Path) -> None:
    summary = made(tmp_path, tokenizer, {"text": "a"}, append_eod=True, eod_token="<|endoftext|>")
    assert summary.eod == "<|endoftext|>"
    assert IndexedDataset(summary.prefixes["text"])[0].tolist()[-1] == 256
    source = write_jsonl(tmp_path / "talk.jsonl", chat("1", "A"))
    chosen = options(source, tmp_path / "talk", tokenizer, append_eod=True, eod_token="<|endoftext|>")
    talk = preprocess(chosen)
    assert IndexedDataset(talk.prefixes["labels"])[0].tolist()[-1] == 256
    with pytest.raises(UserError, match="--eod-token </s>: is not a token of"):
        made(tmp_path, tokenizer, {"text": "a"}, append_eod=True, eod_token="</s>")


def test_the_models_own_template_is_the_default(tmp_path: Path, tokenizer: Path) -> None:
    assert made(tmp_path, tokenizer, chat("1", "A")).template == "chat_template"
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["template"]["prompt_type"] == "chat_template"
    bare = byte_tokenizer(tmp_path / "bare")
    with pytest.raises(UserError, match="OpenAIInstructionHandler needs --prompt-type"):
        made(tmp_path, bare, chat("1", "A"))
    with pytest.raises(UserError, match="--enable-thinking is for conversations"):
        made(tmp_path, tokenizer, {"text": "x"}, enable_thinking="true")


def test_the_counts_do_not_depend_on_blocks_and_workers(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{**chat(str(n % 3), "A" * (n % 2), weight=n % 4 > 0), "id": n} for n in range(40)]
    whole = made(tmp_path, tokenizer, *records)
    assert whole.unread == {"id": 40}
    assert whole.noticed["repeated"] == 34
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 100)
    parts = made(tmp_path, tokenizer, *records, workers=2)
    assert (parts.noticed, parts.unread, parts.dropped) == (whole.noticed, whole.unread, whole.dropped)
    labels = IndexedDataset(whole.prefixes["labels"])
    assert sum(int(np.count_nonzero(sequence != IGNORE)) for sequence in labels) == whole.trained_tokens


def test_what_was_noticed_stays_with_the_data(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, tokenizer, {**chat("1", ""), "id": 1}, chat("1", "A", weight=0), chat("2", "B"))
    page = tmp_path / "page.html"
    assert main(["inspect", "data", str(tmp_path / "x"), "--show", "0", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    for line in ("not read: id", "empty answers, which teach to say nothing: 1", "their weight says so: 1"):
        assert line in out
        assert line in page.read_text()


def test_parts_are_merged_with_what_was_noticed(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("a", "b"):
        source = write_jsonl(tmp_path / f"{part}.jsonl", {**chat("1", ""), part: 1}, {**chat("1", "A"), "id": 1})
        preprocess(options(source, tmp_path / part, tokenizer))
    keys = [f"packed_{key}_document" for key in ("input_ids", "attention_mask", "labels")]
    words = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "all"), "--merge-group-keys", *keys]
    assert main(["preprocess", *words]) == 0
    counts = json.loads((tmp_path / "all.json").read_text())["counts"]
    assert counts["noticed"] == {"empty": 2}
    assert counts["unread"] == {"a": 1, "b": 1, "id": 2}
    (tmp_path / "merged").mkdir()
    source = write_jsonl(tmp_path / "c.jsonl", chat("1", "A"))
    preprocess(options(source, tmp_path / "merged/c", tokenizer, special_tokens_in_text="text"))
    preprocess(options(source, tmp_path / "merged/d", tokenizer))
    words = ["--input", str(tmp_path / "merged"), "--output-prefix", str(tmp_path / "no"), "--merge-group-keys", *keys]
    assert main(["preprocess", *words]) == 2
    assert "special_tokens_in_text is 'encode', but 'text'" in capsys.readouterr().err
