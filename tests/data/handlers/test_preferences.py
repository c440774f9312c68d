"""Preferences: a prompt with a chosen and a rejected answer, as upstream's pairwise handlers write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_toys import byte_tokenizer, write_jsonl
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.statistics import DataView
from tandem.data.templates.catalog import get_template
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError

THOUGHT = "<think>\nhm\n</think>\n\n"
HISTORY = [["earlier?", THOUGHT + "earlier."]]
RECORDS = [
    {"instruction": "Q", "past": HISTORY, "chosen": "good", "rejected": "bad one"},
    {"instruction": "Q", "past": None, "chosen": THOUGHT + "good", "rejected": "x" * 200},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return byte_tokenizer(tmp_path / "tokenizer")


def run(folder: Path, **changes: object) -> dict[str, list[np.ndarray]]:
    source = write_jsonl(folder.parent / "x.jsonl", *RECORDS)
    values = {"map_keys": {"history": "past"}, "prompt_type": "qwen3", **changes}
    prefix = folder.parent / "x"
    summary = preprocess(PreprocessOptions((str(source),), str(prefix), str(folder), **values))  # type: ignore[arg-type]
    assert sorted(path.name for path in prefix.parent.glob("x_packed*.idx")) == [
        f"x_packed_{answer}_{what}_document.idx"
        for answer in ("chosen", "rejected")
        for what in ("input_ids", "labels")
    ]
    return {key: list(IndexedDataset(path)) for key, path in summary.prefixes.items()}


@pytest.mark.parametrize("mode", [None, True, False])
def test_upstreams_encoding(mode: bool | None, folder: Path) -> None:
    """Thoughts of earlier answers left out, none put into them; the empty thought as `--enable-thinking` has it."""
    data = run(folder, enable_thinking=mode)
    tokenizer = Tokenizer(folder)
    empty = "<think>\n\n</think>\n\n"
    opening = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompt = opening.format("earlier?") + "earlier.<|im_end|>\n" + opening.format("Q")
    answers = {"chosen": "good<|im_end|>\n", "rejected": "bad one<|im_end|>\n"}
    for name, answer in answers.items():
        ids, labels = data[f"{name}_input_ids"][0], data[f"{name}_labels"][0]
        source, target = (prompt, empty + answer) if mode else (prompt + empty, answer)
        assert tokenizer.decode(ids) == source + target
        assert tokenizer.decode(labels[labels != IGNORE]) == target
        assert (labels[: len(tokenizer.encode(source))] == IGNORE).all()
    thinking = data["chosen_labels"][1]
    assert (THOUGHT in tokenizer.decode(thinking[thinking != IGNORE])) == (mode is not False)


def test_a_pair_is_dropped_when_one_of_it_is_too_long(folder: Path) -> None:
    data = run(folder, seq_length=200)
    assert {key: len(sequences) for key, sequences in data.items()} == dict.fromkeys(data, 1)
    with pytest.raises(UserError, match=r"none of the 2 documents.*'longer than seq_length': 2"):
        run(folder, seq_length=20)
    for option in ({"pack": True, "seq_length": 99}, {"append_eod": True}):
        with pytest.raises(UserError, match="but AlpacaStylePairwiseHandler reads preferences; leave it out"):
            run(folder, **option)


def test_pairs_are_shown_side_by_side(folder: Path) -> None:
    run(folder)
    view = DataView(folder.parent / "x")
    assert [view.title(index) for index in range(len(view))] == [
        f"sample {number} {answer}" for number in (0, 1) for answer in ("chosen", "rejected")
    ]
    assert [span.text for span in view.spans(1, Tokenizer(folder)) if span.trained] == ["bad one<|im_end|>\n"]
    assert view.statistics().sequences == 4


def test_the_last_answer_alone_equals_the_turn_of_a_short_conversation() -> None:
    from tandem.data.templates.messages import Message

    messages = [Message("system", "S"), Message("user", "Q"), Message("assistant", "A")]
    for mode in (None, True, False):
        template = get_template("qwen3", mode)
        assert template.last_answer(messages) == template.turns(messages)
