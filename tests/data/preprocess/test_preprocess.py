"""Preprocessing end to end: upstream's bytes, any number of workers, bad rows, summaries and records."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from data_toys import ALPACA, byte_tokenizer, options, write_jsonl, written
from tandem.data.batch import IGNORE
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.chunks import TokenizedChunk
from tandem.data.preprocess.run import PreprocessOptions, preprocess, try_first_rows
from tandem.data.preprocess.spool import Spool
from tandem.data.tokens.encoder import TokenizersEngine
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

EOD = 258


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("name", "settings_of_run"),
    [
        ("think_none", {}),
        ("think_true", {"enable_thinking": True}),
        ("pack128_none", {"pack": True, "seq_length": 128}),
        ("neat128_none", {"pack": True, "neat_pack": True, "seq_length": 128}),
        ("pretrain", {"append_eod": True}),
        ("pretrain_noeod", {}),
    ],
)
def test_bytes_equal_upstreams(name: str, settings_of_run: dict, shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "golden"
    source = golden / ("indexed/tiny4.jsonl" if "pretrain" in name else "sft/alpaca_tiny.json")
    prompt_type = None if "pretrain" in name else "qwen3"
    given_options = options(source, tmp_path / name, golden / "tok_tiny", prompt_type=prompt_type, **settings_of_run)
    summary = preprocess(given_options)
    for prefix in summary.prefixes.values():
        for suffix in (".bin", ".idx"):
            ours = Path(prefix + suffix)
            assert ours.read_bytes() == (golden / "sft" / ours.name).read_bytes(), ours.name


@pytest.mark.parametrize("kind", ["pretrain", "neat"])
def test_output_does_not_depend_on_the_workers(
    kind: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 60)
    folder = tmp_path / "out"
    folder.mkdir()
    if kind == "pretrain":
        source = write_jsonl(tmp_path / "x.jsonl", *({"text": f"document {i} " * (i % 4)} for i in range(40)))
        changes: dict[str, object] = {"append_eod": True}
    else:
        source = write_jsonl(tmp_path / "x.jsonl", *ALPACA)
        changes = {"prompt_type": "qwen3", "pack": True, "neat_pack": True, "seq_length": 200}
    results = []
    for workers in (1, 2, 3):
        summary = preprocess(options(source, folder / "x", tokenizer_folder, workers=workers, **changes))
        results.append((summary, written(summary), (folder / "x.json").read_bytes()))
    assert results[0] == results[1] == results[2]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_files_of_other_programs_are_not_removed(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.rejects.jsonl", {"text": "a"})
    with pytest.raises(UserError, match="is the input, but rejected rows would be written to this file"):
        preprocess(options(source, tmp_path / "x", tokenizer_folder))
    assert source.exists()
    (tmp_path / "y.unfinished").mkdir()
    (tmp_path / "y.unfinished" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"y\.unfinished: holds files that tandem did not write"):
        preprocess(options(source, tmp_path / "y", tokenizer_folder))
    assert (tmp_path / "y.unfinished" / "notes.txt").read_text() == "mine"


def test_a_run_that_fails_leaves_the_rejects_of_the_one_before(tokenizer_folder: Path, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", {"text": "a"}, {"text": 1})
    preprocess(options(good, tmp_path / "x", tokenizer_folder, on_bad="skip"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x*")}
    assert "x.rejects.jsonl" in before
    for number, record in enumerate(({"text": ""}, {"text": 2})):
        bad = write_jsonl(tmp_path / f"bad{number}.jsonl", record)
        with pytest.raises(UserError, match="none of the"):
            preprocess(options(bad, tmp_path / "x", tokenizer_folder, on_bad="skip"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x*")} == before


def test_a_full_disk_is_an_error_and_the_same_command_continues(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", *({"text": f"text {n}"} for n in range(40)))
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 100)
    add = Spool.add

    def full(spool: Spool, chunk: TokenizedChunk) -> None:
        add(spool, chunk)
        spool.save()
        if spool.blocks == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Spool, "add", full)
    with pytest.raises(UserError, match=r"No space left on device; .* It continues with what is tokenised so far"):
        preprocess(options(source, tmp_path / "x", tokenizer_folder))
    assert (tmp_path / "x.unfinished" / "progress.json").exists()
    monkeypatch.setattr(Spool, "add", add)
    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder))
    whole = preprocess(options(source, tmp_path / "whole", tokenizer_folder))
    assert written(summary) == written(whole)


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"text": "a"}, {"train_turns": "last"}, "--train-turns is for conversations"),
        ({"text": "a"}, {"over_long": "stop", "seq_length": 9}, "--seq-length is for conversations"),
        (ALPACA[1], {"prompt_type": "qwen3", "json_keys": ("a", "b")}, "--json-keys is for plain text"),
        (ALPACA[1], {"prompt_type": "qwen3", "over_long": "drop"}, "--over-long drop needs --seq-length"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    record: dict, changes: dict, message: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", record)
    with pytest.raises(UserError, match=message):
        preprocess(options(source, tmp_path / "x", tokenizer_folder, **changes))


def test_a_name_that_would_be_too_long_is_refused_before_the_work(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ALPACA[1])
    for over in (0, 1):
        ending = f"._packed_attention_mask_document.idx.{os.getpid()}.part"  # of the longest name, while it is written
        prefix = tmp_path / ("x" * (255 - len(ending) + over))
        if over:
            with pytest.raises(UserError, match="file names would be 1 bytes too long"):
                preprocess(options(source, prefix, tokenizer_folder, prompt_type="qwen3"))
            assert not list(tmp_path.glob(f"{prefix.name}*"))
        else:
            preprocess(options(source, prefix, tokenizer_folder, prompt_type="qwen3"))
            assert Path(f"{prefix}_packed_attention_mask_document.idx").exists()


def test_a_long_text_is_not_a_long_sample(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "ab " * 100_000}, {"text": "c"})
    tokenizer = Tokenizer(tokenizer_folder)
    run = options(source, tmp_path / "x", tokenizer_folder)
    seen: list[int] = []
    encode = TokenizersEngine.encode

    def noted(engine: TokenizersEngine, texts: list[str], end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        seen.extend(map(len, texts))
        return encode(engine, texts, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizersEngine, "encode", noted)
        summary = preprocess(run)
    if summary.engine == "gigatoken":
        assert max(seen) == 1 << 16
    assert IndexedDataset(summary.prefixes["text"])[0].tolist() == tokenizer.encode("ab " * 100_000)


def test_the_mask_covers_the_answers_and_their_end(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_folder)
    chat = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsecond"},
    ]
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": chat})
    preprocess(options(source, tmp_path / "x", tokenizer_folder, prompt_type="qwen3"))
    sample = SFTDataset(tmp_path / "x", "train", "1", None, 1000, seed=0)[0]
    trained = sample.labels[sample.labels != IGNORE]
    assert tokenizer.decode(trained) == "first<|im_end|>\n<think>\nhm\n</think>\n\nsecond<|im_end|>\n"
    assert tokenizer.decode(sample.tokens) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "first<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nhm\n</think>\n\nsecond<|im_end|>\n"
    )


def test_a_cut_answer_gains_no_false_end_and_is_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    records = [{"instruction": "q", "output": "a" * 100}, {"instruction": "q", "output": "short"}]
    source = write_jsonl(tmp_path / "x.jsonl", *records)
    changes = {"prompt_type": "qwen3", "seq_length": 80, "append_eod": True}
    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder, **changes))
    cut, whole = IndexedDataset(summary.prefixes["input_ids"])
    assert (len(cut), summary.trimmed, summary.kept) == (79, 1, 2)
    assert EOD not in cut[-5:]
    assert whole[-3:].tolist() == [EOD, Tokenizer(tokenizer_folder).encode("\n")[0], EOD]


def test_a_cut_prompt_is_counted(tokenizer_folder: Path, tmp_path: Path) -> None:
    records = [{"instruction": "q" * 100, "output": "a"}, {"instruction": "q", "output": "a" * 100}]
    source = write_jsonl(tmp_path / "x.jsonl", *records)
    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder, prompt_type="qwen3", seq_length=80))
    assert (summary.trimmed, summary.trimmed_prompts, summary.kept) == (2, 1, 2)
    cut, _ = IndexedDataset(summary.prefixes["input_ids"])
    header = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = Tokenizer(tokenizer_folder).decode(cut.tolist())
    assert re.fullmatch(rf"<\|im_start\|>user\nq+{re.escape(header)}a<\|im_end\|>\n", text)
    assert len(cut) == 79


def test_long_conversations_are_left_out_on_request(tokenizer_folder: Path, tmp_path: Path) -> None:
    records = [{"instruction": "q", "output": "a" * length} for length in (5, 100, 6)]
    source = write_jsonl(tmp_path / "x.jsonl", *records)
    changes = {"prompt_type": "qwen3", "seq_length": 100, "over_long": "drop"}
    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder, **changes))
    assert (summary.kept, summary.trimmed, summary.dropped["longer than seq_length"]) == (2, 0, 1)
    whole = preprocess(
        options(write_jsonl(tmp_path / "y.jsonl", *records[::2]), tmp_path / "y", tokenizer_folder, **changes)
    )
    assert written(summary) == written(whole)


@pytest.mark.parametrize("is_pair", [False, True])
def test_the_first_long_conversation_ends_the_run_on_request(
    is_pair: bool, tokenizer_folder: Path, tmp_path: Path
) -> None:
    def record(length: int) -> dict[str, str]:
        answer = "a" * length
        return {"instruction": "q", **({"chosen": "c", "rejected": answer} if is_pair else {"output": answer})}

    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [record(5), [], record(6), record(100), record(200)]))
    changes = {"prompt_type": "qwen3", "seq_length": 100, "over_long": "stop", "on_bad": "skip"}
    with pytest.raises(UserError, match=r"x\.jsonl:4: \d{3} tokens, but --seq-length allows 99;.*--over-long"):
        preprocess(options(source, tmp_path / "x", tokenizer_folder, **changes))
    assert not list(tmp_path.glob("x[._]*document*"))
    write_jsonl(source, record(5), record(6))
    assert preprocess(options(source, tmp_path / "x", tokenizer_folder, **changes)).kept == 2


def test_nothing_is_written_that_trains_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    chat = [{"role": role, "content": "x" * 200} for role in ("user", "assistant")]
    source = write_jsonl(tmp_path / "x.jsonl", {"messages": chat}, {"messages": [{**chat[0], "content": ""}, chat[1]]})
    with pytest.raises(
        UserError, match=r"none of the 2 documents can be used; rejected 0, dropped \{'nothing left to train': 2\}"
    ):
        preprocess(options(source, tmp_path / "x", tokenizer_folder, prompt_type="qwen3", seq_length=2))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("x_", ".", "x.json"))] == ["x.jsonl"]


def test_packing_loses_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", *ALPACA)
    plain = preprocess(options(source, tmp_path / "plain", tokenizer_folder, prompt_type="qwen3"))
    packed = preprocess(
        options(
            source, tmp_path / "neat", tokenizer_folder, prompt_type="qwen3", pack=True, neat_pack=True, seq_length=250
        )
    )
    rows = {key: IndexedDataset(prefix) for key, prefix in packed.prefixes.items()}
    pieces = []
    for row in range(packed.sequences):
        ids, mask = rows["input_ids"][row], rows["attention_mask"][row]
        assert len(ids) == 250
        assert mask[-1] == 0
        pieces += [ids[mask == segment].tolist() for segment in range(1, mask.max() + 1)]
    assert sorted(pieces) == sorted(sequence.tolist() for sequence in IndexedDataset(plain.prefixes["input_ids"]))
    assert (packed.kept, packed.tokens, packed.trained_tokens) == (30, plain.tokens, plain.trained_tokens)


def test_several_json_keys(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"a": "1", "b": "22"}, {"a": "", "b": "3"}, {"a": "", "b": ""})
    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder, json_keys=("a", "b"), append_eod=True))
    assert [len(IndexedDataset(summary.prefixes[key])) for key in "ab"] == [1, 2]
    assert (summary.kept, summary.dropped) == (2, {"empty a": 2, "empty b": 1})


BAD_ROWS = [b"", b'{"text": "tru', b'{"text": "\xff"}', b"[1]", b'{"text": 1}', b'{"body": "x"}']


def test_a_bad_row_stops_or_is_set_aside(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b"\n".join([b'{"text": "good"}', *BAD_ROWS, b'{"text": "fine"}', b""]))
    with pytest.raises(UserError, match=r"x\.jsonl:2: empty line.*--on-bad skip"):
        preprocess(options(source, tmp_path / "x", tokenizer_folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer", "x.jsonl"]

    summary = preprocess(options(source, tmp_path / "x", tokenizer_folder, on_bad="skip"))
    assert (summary.documents, summary.kept, summary.rejected) == (8, 2, 6)
    assert summary.rejects is not None
    rejects = [json.loads(line) for line in Path(summary.rejects).read_text().splitlines()]
    assert [reject["reason"].split(": ")[0] for reject in rejects] == [f"{source}:{n}" for n in range(2, 8)]
    assert rejects[4]["reason"].endswith("field 'text': expected a string, found int 1")
    assert rejects[1]["content"] == '{"text": "tru'
    source.write_bytes(b'{"text": "good"}\n')
    preprocess(options(source, tmp_path / "x", tokenizer_folder, on_bad="skip"))
    assert not Path(summary.rejects).exists()  # it belonged to the earlier run


def test_bad_rows_are_named_with_several_workers_too(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": 5})
    with pytest.raises(UserError, match=r"x\.jsonl:2: field 'text': expected a string, found int 5"):
        preprocess(options(source, tmp_path / "x", tokenizer_folder, workers=2))


def test_nothing_kept_is_an_error(tokenizer_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", {"text": ""}, {"text": 1})
    with pytest.raises(
        UserError,
        match=r"none of the 2 documents can be used; rejected 1, dropped \{'empty text': 1\}; first rejected row: ",
    ):
        preprocess(options(source, tmp_path / "x", tokenizer_folder, on_bad="skip"))
    assert not list(tmp_path.glob("x_text*"))


def test_handlers_are_detected_and_options_checked_against_them(tokenizer_folder: Path, tmp_path: Path) -> None:
    alpaca = write_jsonl(tmp_path / "alpaca.jsonl", *ALPACA)
    text = write_jsonl(tmp_path / "text.jsonl", {"text": "x"})
    with pytest.raises(UserError, match="AlpacaStyleInstructionHandler needs --prompt-type"):
        preprocess(options(alpaca, tmp_path / "x", tokenizer_folder))
    with pytest.raises(UserError, match="--prompt-type is for conversations"):
        preprocess(options(text, tmp_path / "x", tokenizer_folder, prompt_type="qwen3"))
    with pytest.raises(UserError, match="--seq-length is for conversations"):
        preprocess(options(text, tmp_path / "x", tokenizer_folder, seq_length=8))
    with pytest.raises(UserError, match=r"alpaca\.jsonl:1: field 'text'"):
        preprocess(options(alpaca, tmp_path / "x", tokenizer_folder, handler_name="GeneralPretrainHandler"))
    with pytest.raises(UserError, match=r"alpaca\.jsonl:1: fields .* fit no handler"):
        preprocess(options(alpaca, tmp_path / "x", tokenizer_folder, map_keys={"prompt": "q"}))
    bare = byte_tokenizer(tmp_path / "bare", eos_token=None, pad_token=None)
    with pytest.raises(UserError, match=r"names no end token.*--eod-token"):
        preprocess(options(text, tmp_path / "x", bare, append_eod=True))
    with pytest.raises(UserError, match="names no padding token"):
        preprocess(options(alpaca, tmp_path / "x", bare, prompt_type="qwen3", pack=True, seq_length=99))
    preprocess(options(text, tmp_path / "absent/too/x", tokenizer_folder))
    assert (tmp_path / "absent/too/x_text_document.idx").exists()
    with pytest.raises(UserError, match="is a folder; add a name for the files"):
        preprocess(dataclasses.replace(options(text, tmp_path / "x", tokenizer_folder), output_prefix=f"{tmp_path}/"))
    (tmp_path / "x.unfinished").touch()
    with pytest.raises(UserError, match=r"x\.unfinished: cannot be created"):
        preprocess(options(text, tmp_path / "x", tokenizer_folder))
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(UserError, match=r"none\.jsonl: no rows"):
        try_first_rows(
            options(tmp_path / "none.jsonl", tmp_path / "y", tokenizer_folder, handler_name="GeneralPretrainHandler")
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": ()}, "input is empty"),
        ({"input": ("x", "")}, "--input: a name is empty"),
        ({"json_keys": ()}, "--json-keys is empty"),
        ({"json_keys": ("a/b",)}, "--json-keys a/b: the key becomes part of a file name"),
        ({"json_keys": ("a", "a")}, "a field is named twice"),
        ({"workers": 0}, "--workers 0: expected 1 or more"),
        ({"log_interval": 0}, "--log-interval 0: expected 1 or more"),
        ({"on_bad": "ignore"}, "--on-bad ignore: expected stop or skip"),
        ({"over_long": "keep"}, "--over-long keep: expected trim or drop or stop"),
        ({"max_samples": 0}, "--max-samples 0: expected 1 or more"),
        ({"pad_to_multiple_of": 0}, "--pad-to-multiple-of 0: expected 1 or more"),
        ({"seq_length": 1}, "--seq-length 1: expected 2 or more"),
        ({"neat_pack": True}, "--neat-pack needs --pack"),
        ({"pack": True}, "--pack needs --seq-length"),
        ({"eod_token": "x"}, "--eod-token x needs --append-eod"),
        ({"prompt_type": "qwen"}, "did you mean 'qwen3'"),
        ({"handler_name": "AlpacaHandler"}, "expected one of"),
    ],
)
def test_options_are_validated(changes: dict, message: str) -> None:
    valid = PreprocessOptions(("x",), "y", "z")
    with pytest.raises(UserError, match=message):
        dataclasses.replace(valid, **changes)


def test_progress_is_reported(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.data.sources.readers._BLOCK_BYTES", 20)
    source = write_jsonl(tmp_path / "x.jsonl", *({"text": "abc"} for _ in range(10)))
    calls: list[tuple[int, int]] = []
    preprocess(options(source, tmp_path / "x", tokenizer_folder, log_interval=4), lambda *done: calls.append(done))
    assert calls == [(4, 12), (8, 24)]


def test_real_instructions_with_the_real_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    """The alpaca and the messages form of the same questions give the same bytes; each answer is trained."""
    results = []
    for name in ("gsm8k_test_alpaca.json", "gsm8k_test_messages.jsonl"):
        source = shared_data / "instruct" / name
        results.append(preprocess(options(source, tmp_path / name, shared_data / "qwen3-0.6b", prompt_type="qwen3")))
    assert written(results[0]) == written(results[1])
    assert (results[0].kept, results[0].dropped) == (1319, {})
    labels = IndexedDataset(results[0].prefixes["labels"])
    assert all(np.count_nonzero(sequence != IGNORE) > 2 for sequence in labels)


def test_a_template_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "tokenizer")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "</s>"))
    byte_config = {"eos_token": "</s>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(byte_config))
    source = write_jsonl(tmp_path / "x.jsonl", *ALPACA)
    with pytest.raises(UserError, match=r"ends messages with <\|im_end\|>, which is not a token of"):
        preprocess(options(source, tmp_path / "x", folder, prompt_type="qwen3"))
