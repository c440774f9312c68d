"""The record next to a dataset: training refuses data that another tokenizer or template made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.record import check_record, read_record
from tandem.data.templates.catalog import get_template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

CHAT = {"instruction": "q", "output": "a"}


def conversations(folder: Path, **changes: object) -> Tokenizer:
    tokenizer = byte_tokenizer(folder / "tokenizer")
    source = write_jsonl(folder / "raw.jsonl", CHAT)
    preprocess(
        PreprocessOptions((str(source),), str(folder / "sft"), str(tokenizer), prompt_type="qwen3", **changes)  # type: ignore[arg-type]
    )
    return Tokenizer(tokenizer)


def test_agreement_passes_and_a_missing_record_is_a_notice(tmp_path: Path) -> None:
    tokenizer = conversations(tmp_path)
    assert check_record(tmp_path / "sft", tokenizer, get_template("qwen3")) is None
    assert check_record(tmp_path / "sft", tokenizer) is None
    notice = check_record(tmp_path / "other", tokenizer, get_template("qwen3"))
    assert notice is not None
    assert "the data has no record" in notice


def test_the_differing_field_is_named(tmp_path: Path) -> None:
    tokenizer = conversations(tmp_path)
    with pytest.raises(UserError, match=r"sft\.json: template.enable_thinking is None, this run's is True"):
        check_record(tmp_path / "sft", tokenizer, get_template("qwen3", True))
    other = Tokenizer(byte_tokenizer(tmp_path / "other", eos_token="<|endoftext|>"))
    with pytest.raises(UserError, match=r"tokenizer\.eos_token_id is 258, this run's is 256"):
        check_record(tmp_path / "sft", other)
    with (tmp_path / "other/tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"tokenizer\.sha256 is '[0-9a-f]{64}', this run's is"):
        check_record(tmp_path / "sft", Tokenizer(tmp_path / "other"))


def test_packed_rows_must_fit_the_run(tmp_path: Path) -> None:
    tokenizer = conversations(tmp_path, pack=True, seq_length=128)
    assert check_record(tmp_path / "sft", tokenizer, seq_length=128) is None
    with pytest.raises(UserError, match=r"options\.seq_length is 128, this run's --seq-length is 64"):
        check_record(tmp_path / "sft", tokenizer, seq_length=64)


def test_plain_text_is_no_conversation_and_is_found_by_its_pair(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "raw.jsonl", {"my_text": "x"})
    preprocess(PreprocessOptions((str(source),), str(tmp_path / "p_t"), str(tokenizer), json_keys=("my_text",)))
    for data_path in ("p_t", "p_t_my_text_document"):
        path_and_record = read_record(tmp_path / data_path)
        assert path_and_record is not None
        assert path_and_record[0] == tmp_path / "p_t.json"
    assert read_record(tmp_path / "p") is None
    with pytest.raises(UserError, match="plain text for pretraining"):
        check_record(tmp_path / "p_t_my_text_document", Tokenizer(tokenizer), get_template("qwen3"))


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    tokenizer = conversations(tmp_path)
    record = json.loads((tmp_path / "sft.json").read_text())
    assert record["tokenizer"] == {"sha256": tokenizer.sha256, "length": 261, "eos_token_id": 258}
    assert record["template"] == {
        "prompt_type": "qwen3",
        "sha256": get_template("qwen3").sha256,
        "enable_thinking": None,
    }
    raw = (tmp_path / "raw.jsonl").read_bytes()
    assert record["sources"][0]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert record["options"]["handler_name"] == "AlpacaStyleInstructionHandler"
    assert (record["counts"]["documents"], record["counts"]["kept"]) == (1, 1)
    assert record["files"]["labels"] == "sft_packed_labels_document"


def test_a_file_that_is_not_a_record_is_never_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    source = tmp_path / "raw.json"
    source.write_text(json.dumps([CHAT]))
    with pytest.raises(UserError, match=r"raw\.json: is not a record, but the record would replace it"):
        preprocess(PreprocessOptions((str(source),), str(tmp_path / "raw"), str(tokenizer), prompt_type="qwen3"))
    assert json.loads(source.read_text()) == [CHAT]


def test_a_damaged_or_newer_record_is_named(tmp_path: Path) -> None:
    tokenizer = conversations(tmp_path)
    path = tmp_path / "sft.json"
    content = path.read_text()
    path.write_text(content.replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match="record version 99"):
        check_record(tmp_path / "sft", tokenizer)
    path.write_text(content[:-20])
    with pytest.raises(UserError, match="not a valid record"):
        check_record(tmp_path / "sft", tokenizer)


def test_a_record_is_only_of_the_files_that_it_names(tmp_path: Path) -> None:
    """Text and conversations under one output prefix would overwrite each other's record."""
    tokenizer = conversations(tmp_path)
    text = write_jsonl(tmp_path / "text.jsonl", {"text": "plain"})
    with pytest.raises(
        UserError, match=r"sft\.json: is already the record of sft_packed_input_ids_document.*sft_text_document"
    ):
        preprocess(PreprocessOptions((str(text),), str(tmp_path / "sft"), str(tmp_path / "tokenizer")))
    assert not list(tmp_path.glob("sft_text*"))
    assert read_record(tmp_path / "sft_packed_labels_document") is not None
    assert read_record(tmp_path / "sft_text_document") is None  # sft.json is not about these files
    notice = check_record(tmp_path / "sft_text_document", tokenizer)
    assert notice is not None
    assert "is the record of sft_packed_input_ids_document" in notice
    conversations(tmp_path)  # the same set of files may be made again
