"""Several datasets of one dataset_info.json, concatenated or interleaved as Hugging Face `datasets` does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.mixing import interleaved
from tandem.data.preprocess.run import PreprocessOptions, PreprocessSummary, preprocess
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), oversample=st.booleans(), seed=st.integers(0, 99))
def test_drawn_turns_go_one_by_one(lengths: list[int], oversample: bool, seed: int) -> None:
    """Against the definition of `interleave_datasets`: draw, take the dataset's next sample, stop when used up."""
    weights = [float(i + 1) for i in range(len(lengths))]
    probabilities = [weight / sum(weights) for weight in weights]
    random = np.random.default_rng(seed)
    taken = [0] * len(lengths)
    expected: list[int] = []
    while not (all if oversample else any)(count >= length for count, length in zip(taken, lengths)):
        for dataset in random.choice(len(lengths), size=1000, p=probabilities).tolist():
            if (all if oversample else any)(count >= length for count, length in zip(taken, lengths)):
                break
            expected.append(sum(lengths[:dataset]) + taken[dataset] % lengths[dataset])
            taken[dataset] += 1
    assert interleaved(lengths, probabilities, seed, oversample).tolist() == expected


def test_plain_turns() -> None:
    """The examples that the documentation of `interleave_datasets` gives."""
    assert interleaved([3, 4, 5], None, 0, False).tolist() == [0, 3, 7, 1, 4, 8, 2, 5, 9]
    assert interleaved([3, 4, 5], None, 0, True).tolist() == [0, 3, 7, 1, 4, 8, 2, 5, 9, 0, 6, 10, 1, 3, 11]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two datasets: `one` of 3 alpaca records, `two` of 5 conversations under names of their own."""
    write_jsonl(tmp_path / "one.jsonl", *({"instruction": f"a{i}", "input": "no", "output": "o"} for i in range(3)))
    (tmp_path / "second").mkdir()
    for part, numbers in (("a", range(2)), ("b", range(2, 5))):
        chats = [[{"role": "user", "content": f"b{i}"}, {"role": "bot", "content": "o"}] for i in numbers]
        write_jsonl(tmp_path / "second" / f"{part}.jsonl", *({"chat": chat} for chat in chats))
    info: dict[str, Any] = {
        "one": {"file_name": "one.jsonl", "columns": {"prompt": "instruction", "response": "output"}},
        "two": {
            "file_name": "second",
            "formatting": "sharegpt",
            "columns": {"messages": "chat"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"},
        },
        "hub": {"hf_hub_url": "x/y"},
        "pairs": {"file_name": "one.jsonl", "ranking": True, "columns": {"prompt": "instruction", "chosen": "output"}},
        "pictures": {"file_name": "one.jsonl", "columns": {"images": "x"}},
        "few": {"file_name": "one.jsonl", "num_samples": 2},
        "sha1": {
            "file_name": "one.jsonl",
            "file_sha1": hashlib.sha1((tmp_path / "one.jsonl").read_bytes()).hexdigest(),
        },
        "other": {"file_name": "one.jsonl", "file_sha1": "0"},
        "typo": {"file_name": "one.jsonl", "colums": {"prompt": "instruction"}},
        "split": {"file_name": "one.jsonl", "split": "test"},
        "both": {"file_name": "one.jsonl", "hf_hub_url": "x/y"},
        "none": {"file_name": "one.jsonl", "num_samples": 0},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def run(folder: Path, names: str = "one,two", **changes: object) -> PreprocessSummary:
    tokenizer = byte_tokenizer(folder / "tokenizer")
    handler = "LlamaFactoryInstructionHandler"
    values = {"handler_name": handler, "dataset_dir": str(folder), "prompt_type": "qwen3", **changes}
    options = PreprocessOptions((names,), str(folder / "out"), str(tokenizer), **values)  # type: ignore[arg-type]
    return preprocess(options)


def questions(folder: Path, summary: PreprocessSummary) -> list[str]:
    tokenizer = Tokenizer(folder / "tokenizer")
    texts = [tokenizer.decode(ids) for ids in IndexedDataset(summary.prefixes["input_ids"])]
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]


def test_concatenated(folder: Path) -> None:
    summary = run(folder, "some/path/one, two")
    assert questions(folder, summary) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]  # "input" is not named
    assert questions(folder, run(folder, "two,one", max_samples=2)) == ["b0", "b1", "a0", "a1"]
    record = json.loads((folder / "out.json").read_text())
    assert [Path(source["file"]).name for source in record["sources"]] == ["a.jsonl", "b.jsonl", "one.jsonl"]


def test_what_an_entry_says_is_heard(folder: Path) -> None:
    assert questions(folder, run(folder, "few,two")) == ["a0\nno", "a1\nno", "b0", "b1", "b2", "b3", "b4"]
    assert questions(folder, run(folder, "few,two", max_samples=1)) == ["a0\nno", "b0"]
    assert len(questions(folder, run(folder, "sha1"))) == 3


def test_preferences_of_dataset_info(folder: Path) -> None:
    """The entries of LLaMA-Factory's documentation: `ranking`, and `kto_tag` among the columns."""
    turns = [{"from": "human", "value": "b0"}, *({"from": "gpt", "value": text} for text in ("good", "bad"))]
    openai = [{"role": "user", "content": "c0"}, {"role": "assistant", "content": "good"}]
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "a0", "input": "", "good": "good", "rejected": "bad", "past": [["1", "2"]]},
        "sharegpt": {"conversations": turns[:1], "chosen": turns[1], "rejected": turns[2]},
        "kto": {"instruction": "d0", "output": "good", "tag": False},
        "chat": {"messages": openai, "label": True},
    }
    for name, row in rows.items():
        write_jsonl(folder / f"{name}.jsonl", row)
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    alpaca = {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "rejected", "history": "past"}
    columns: dict[str, dict[str, Any]] = {
        "alpaca": {"ranking": True, "columns": alpaca},
        "sharegpt": {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        "kto": {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "tag"}},
        "chat": {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": roles,
        },
    }
    info = {name: {"file_name": f"{name}.jsonl", **entry} for name, entry in columns.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    pairs, tokenizer = run(folder, "alpaca,sharegpt", mix_strategy="interleave_under"), Tokenizer(folder / "tokenizer")
    assert pairs.handlers == ("AlpacaStylePairwiseHandler", "SharegptStylePairwiseHandler")
    for side, answer in (("chosen", "good"), ("rejected", "bad")):
        ids, labels = (IndexedDataset(pairs.prefixes[f"{side}_{what}"]) for what in ("input_ids", "labels"))
        texts = [tokenizer.decode(sequence) for sequence in ids]
        assert ["a0" in texts[0], "1<|im_end|>" in texts[0], "b0" in texts[1]] == [True] * 3
        trained = [tokenizer.decode(sequence[sequence != IGNORE]) for sequence in labels]
        assert trained == [f"{answer}<|im_end|>\n"] * 2
    (folder / "out.json").unlink()
    unpaired = run(folder, "kto,chat")
    assert unpaired.handlers == ("AlpacaStyleUnpairedHandler", "SharegptStyleUnpairedHandler")
    assert [number.tolist() for number in IndexedDataset(unpaired.prefixes["completion_desirable"])] == [[0], [1]]
    assert unpaired.noticed == {"desirable": 1, "undesirable": 1}


def test_interleaved(folder: Path) -> None:
    under = run(folder, mix_strategy="interleave_under")
    assert questions(folder, under) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    over = run(folder, mix_strategy="interleave_over", interleave_probs=(0.5, 0.5), seed=3)
    asked = ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "b4"]
    assert questions(folder, over) == [asked[i] for i in interleaved([3, 5], (0.5, 0.5), 3, True)]
    ids, labels = (IndexedDataset(over.prefixes[key]) for key in ("input_ids", "labels"))
    assert (over.sequences, over.tokens) == (len(ids), ids.num_tokens)
    assert over.trained_tokens == sum(int(np.count_nonzero(sequence != IGNORE)) for sequence in labels)
    packed = run(folder, mix_strategy="interleave_under", pack=True, neat_pack=True, seq_length=300)
    assert packed.tokens == under.tokens


def test_interleaving_does_not_depend_on_being_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(folder, mix_strategy="interleave_over")
    bytes_of_whole = Path(f"{whole.prefixes['labels']}.bin").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("tandem.data.preprocess.run._require_kept", lambda spool, _: spool.save() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, mix_strategy="interleave_over")
    with monkeypatch.context() as patch:
        patch.setattr(
            "tandem.data.preprocess.dialogues.InstructionTokenizer._tokenize", lambda *_: 1 / 0
        )  # nothing is left to do
        again = run(folder, mix_strategy="interleave_over")
    assert Path(f"{again.prefixes['labels']}.bin").read_bytes() == bytes_of_whole


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        ("three", {}, r"no dataset 'three'; the file has \['both', 'few', 'hub', "),
        (",", {}, "--input names no dataset"),
        ("hub", {}, "dataset 'hub': file_name is missing, and only local files are read"),
        ("pairs", {}, r"one\.jsonl:1: field 'rejected' \(--map-keys 'rejected'\) is missing"),
        (
            "one,pairs",
            {},
            "AlpacaStylePairwiseHandler reads preferences, and Alp.* conversations; preprocess them apart",
        ),
        ("pictures", {}, r"dataset 'pictures': columns \['images'\] are not read"),
        ("other", {}, r"dataset 'other': file_sha1 is '0', but that of .*one\.jsonl"),
        ("typo", {}, "dataset 'typo': 'colums' is not known here.*did you mean 'columns'"),
        ("split", {}, "dataset 'split': 'split' is not known here"),
        ("both", {}, "dataset 'both': hf_hub_url names data that are not on this disk"),
        ("none", {}, "dataset 'none': num_samples is 0"),
        ("one", {"map_keys": {"prompt": "q"}}, "takes field names from dataset_info.json"),
        ("one", {"dataset_dir": None}, "needs --dataset-dir"),
        (
            "one",
            {"handler_name": "", "dataset_dir": None, "mix_strategy": "interleave_over"},
            "--mix-strategy works only with --handler-name Ll",
        ),
        ("one,two", {"interleave_probs": (0.5, 0.5)}, "--interleave-probs needs --mix-strategy"),
        ("one,two", {"mix_strategy": "interleave_over", "interleave_probs": (1.0,)}, "expected one for each of the 2"),
        ("one,two", {"mix_strategy": "interleave_over", "interleave_probs": (0.5, 0.6)}, "whose sum is 1"),
    ],
)
def test_errors(names: str, changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, names, **changes)


def test_padded_documents(tmp_path: Path) -> None:
    """As upstream: at least one id more, the id beyond the vocabulary, and the end-of-document token at the end."""
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "x.jsonl", *({"text": "x" * length} for length in (1, 3, 4)))
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for append_eod in (True, False):
        options = PreprocessOptions((str(source),), str(tmp_path / "x"), str(tokenizer), append_eod=append_eod)
        summary = preprocess(PreprocessOptions(**{**vars(options), "pad_to_multiple_of": 4}))
        for sequence in IndexedDataset(summary.prefixes["text"]):
            lengths[append_eod].append(len(sequence))
            tail = sequence[np.flatnonzero(sequence == len(Tokenizer(tokenizer))).min(initial=len(sequence) - 1) :]
            assert (sequence[-1] == 258) == append_eod
            assert set(tail[: len(tail) - append_eod].tolist()) <= {261}
    assert lengths == {True: [4, 4, 8], False: [4, 4, 8]}
