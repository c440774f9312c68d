"""Fine-tuning samples: labels, documents, order, cutting."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.batch import IGNORE
from tandem.data.datasets.conversations import SFTDataset
from tandem.data.indexed import IndexedDataset, IndexedWriter
from tandem.data.kinds import CONVERSATIONS
from tandem.data.templates.truncation import TurnLengths, infer_seqlen, kept_tokens, turn_budgets
from tandem.errors import UserError

EOD = 9


def packed_triple(prefix: Path, *rows: tuple[list[int], list[int], list[int]]) -> Path:
    """Write rows of (ids, attention_mask, trained flags)."""
    columns: dict[str, list[list[int]]] = {key: [] for key in CONVERSATIONS.keys}
    for ids, mask, trained in rows:
        columns["input_ids"].append(ids)
        columns["attention_mask"].append(mask)
        columns["labels"].append([token if flag else IGNORE for token, flag in zip(ids, trained)])
    for key, values in columns.items():
        with IndexedWriter(f"{prefix}_packed_{key}_document") as writer:
            for value in values:
                writer.add_document(value)
    return prefix


def only(prefix: Path, seq_length: int = 100, **flags: object):
    return SFTDataset(prefix, "train", "1", None, seq_length, seed=0, **flags)[0]  # type: ignore[arg-type]


def test_labels_are_shifted_and_prompt_and_padding_are_not_trained(tmp_path: Path) -> None:
    prefix = packed_triple(tmp_path / "x", ([1, 2, 3, 4, EOD, 0, 0], [1] * 7, [0, 0, 1, 1, 1, 0, 0]))
    sample = only(prefix)
    assert sample.tokens.tolist() == [1, 2, 3, 4, EOD]
    assert sample.labels.tolist() == [IGNORE, 3, 4, EOD, IGNORE]
    assert sample.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert sample.lengths == (5,)


def test_neat_packed_segments_are_documents(tmp_path: Path) -> None:
    ids, mask = [1, 2, 3, 4, 5, 6, 7, 0, 0], [1, 1, 1, 2, 2, 2, 2, 0, 0]
    prefix = packed_triple(tmp_path / "x", (ids, mask, [0, 1, 1, 0, 0, 1, 1, 0, 0]))
    sample = only(prefix)
    assert sample.lengths == (3, 4)
    assert sample.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert sample.labels.tolist() == [2, 3, IGNORE, IGNORE, 6, 7, IGNORE]


def test_plainly_packed_rows_split_at_eod_only_on_request(tmp_path: Path) -> None:
    ids = [1, 2, EOD, 3, 4, EOD, 0, 0]
    prefix = packed_triple(tmp_path / "x", (ids, [1] * 8, [0, 1, 1, 0, 1, 1, 0, 0]))
    assert only(prefix).lengths == (6,)
    reset = only(prefix, eod_token=EOD, reset_attention_mask=True, reset_position_ids=True)
    assert reset.lengths == (3, 3)
    assert reset.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert reset.labels.tolist() == [2, EOD, IGNORE, 4, EOD, IGNORE]
    positions_only = only(prefix, eod_token=EOD, reset_position_ids=True)
    assert (positions_only.lengths, positions_only.position_ids.tolist()) == ((6,), [0, 1, 2, 0, 1, 2])


def test_a_reset_that_would_cut_prompts_from_answers_is_refused(tmp_path: Path) -> None:
    prefix = packed_triple(tmp_path / "x", ([1, EOD, 2, EOD], [1] * 4, [0, 0, 1, 1]))
    with pytest.raises(UserError, match="or preprocess with --neat-pack"):
        only(prefix, eod_token=EOD, reset_attention_mask=True)


def test_neat_packed_rows_need_no_eod_to_be_reset(tmp_path: Path) -> None:
    """Upstream asks for --reset-attention-mask with --neat-pack; one sample holds its end twice."""
    prefix = packed_triple(tmp_path / "x", ([1, EOD, 2, EOD, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]))
    sample = only(prefix, eod_token=EOD, reset_attention_mask=True, reset_position_ids=True)
    assert (sample.lengths, sample.position_ids.tolist()) == ((4,), [0, 1, 2, 3])


def test_cutting_follows_upstream(tmp_path: Path) -> None:
    assert infer_seqlen(100, 10, 50) == (40, 10)  # a short target is kept whole
    assert infer_seqlen(10, 100, 50) == (10, 40)  # a short source is kept whole
    assert infer_seqlen(60, 40, 50) == (30, 20)  # else in proportion
    assert turn_budgets([TurnLengths(10, 10, 0)] * 3, 30) == [(10, 10), (5, 5)]

    ids = list(range(20, 40))  # two turns of 5 + 5
    prefix = packed_triple(tmp_path / "x", (ids, [1] * 20, ([0] * 5 + [1] * 5) * 2))
    sample = only(prefix, seq_length=14)
    assert sample.tokens.tolist() == [*range(20, 30), 30, 31, 35, 36]
    assert sample.labels.tolist() == [IGNORE] * 4 + [25, 26, 27, 28, 29] + [IGNORE] * 2 + [35, 36, IGNORE]


def test_a_cut_prompt_keeps_the_header_of_its_answer(tmp_path: Path) -> None:
    turns = [TurnLengths(10, 4, 3), TurnLengths(5, 5, 3)]
    keep, cuts_prompt = kept_tokens(turns, 9)
    assert (np.flatnonzero(keep).tolist(), cuts_prompt) == ([0, 1, 7, 8, 9, 10, 11, 12, 13], True)
    keep, cuts_prompt = kept_tokens(turns, 17)  # 3 are left for the second turn: no token after its header
    assert (np.flatnonzero(keep).tolist(), cuts_prompt) == (list(range(14)), False)
    keep, cuts_prompt = kept_tokens(turns, 18)  # the budgets give its source 2, but the header comes first
    assert (np.flatnonzero(keep).tolist(), cuts_prompt) == ([*range(14), 16, 17, 18, 19], True)
    assert np.flatnonzero(kept_tokens([TurnLengths(300, 20000, 9)], 512)[0]).tolist() == list(range(291, 300 + 503))
    assert np.flatnonzero(kept_tokens(turns, 2)[0]).tolist() == [8, 9]  # something remains

    ids = [20, 21, 22, 23, 24, EOD, 25, 30, 31, EOD]
    prefix = packed_triple(tmp_path / "x", (ids, [1] * 10, [0] * 7 + [1] * 3))
    assert only(prefix, seq_length=7, header=(EOD, 25)).tokens.tolist() == [20, 21, EOD, 25, 30, 31, EOD]
    assert only(prefix, seq_length=7, header=(EOD, 26)).tokens.tolist() == [20, 21, 22, 23, 30, 31, EOD]
    for length in range(1, 10):
        sample = only(prefix, seq_length=length, header=(EOD, 25))
        assert len(sample.tokens) == len(sample.labels) == len(sample.position_ids) == sum(sample.lengths) == length


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(1, 50),
)
def test_no_answer_of_a_cut_conversation_lacks_its_header(turns: list[tuple[int, int, int]], room: int) -> None:
    lengths = [TurnLengths(source, target, min(source, header)) for source, target, header in turns]
    keep, _ = kept_tokens(lengths, room)
    assert min(1, len(keep)) <= np.count_nonzero(keep) <= room
    begin = 0
    for turn in lengths:
        answer = begin + turn.source
        if keep[answer : answer + turn.target].any() and room > turn.header:
            assert keep[answer - turn.header : answer].all()
        begin = answer + turn.target


def test_order_continues_one_generator_over_epochs_and_is_prefix_stable(tmp_path: Path) -> None:
    rows = [([i, i + 100], [1, 1], [0, 1]) for i in range(10)]
    prefix = packed_triple(tmp_path / "x", *rows)
    random, expected = np.random.RandomState(42), []
    for _ in range(3):
        epoch = np.arange(8)  # 80 % of 10
        random.shuffle(epoch)
        expected += epoch.tolist()

    def order(dataset: SFTDataset, indices: range) -> list[int]:
        return [int(dataset[i].tokens[0]) for i in indices]

    long = SFTDataset(prefix, "train", "80,20,0", 20, 10, seed=42)
    assert len(long) == 24
    assert order(long, range(24)) == expected
    assert order(SFTDataset(prefix, "train", "80,20,0", 5, 10, seed=42), range(8)) == expected[:8]
    assert order(SFTDataset(prefix, "train", "80,20,0", 20, 10, seed=42), range(17, 19)) == expected[17:19]
    assert order(SFTDataset(prefix, "train", "80,20,0", 8, 10, seed=42, shuffle=False), range(8)) == list(range(8))
    assert {int(t) for t in order(SFTDataset(prefix, "valid", "80,20,0", None, 10, seed=1), range(2))} == {8, 9}
    assert long.describe() == {"sequences": 8, "tokens": 16, "samples_per_epoch": 8, "samples": 24, "epochs": 3}


def test_golden_neat_packed_rows_come_apart_into_the_unpacked_samples(shared_data: Path) -> None:
    """The documents of the packed rows are the samples of the unpacked file, labels included."""
    golden = shared_data / "golden/sft"
    packed = SFTDataset(golden / "neat128_none", "train", "1", None, 128, seed=1)
    unpacked = SFTDataset(golden / "think_none", "train", "1", None, 127, seed=1)
    parts = []
    for i in range(len(packed)):
        sample = packed[i]
        edges = np.cumsum([0, *sample.lengths])
        parts += [(sample.tokens[a:b].tolist(), sample.labels[a:b].tolist()) for a, b in pairwise(edges)]
    whole = [(unpacked[i].tokens.tolist(), unpacked[i].labels.tolist()) for i in range(len(unpacked))]
    assert sorted(parts) == sorted(whole)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 sequences are empty, the first is number 1"):
        only(packed_triple(tmp_path / "empty", ([1], [1], [1]), ([], [], [])))
    prefix = packed_triple(tmp_path / "x", ([1, 2], [1, 1], [0, 1]))
    with pytest.raises(UserError, match="valid of split 1,0,0 holds none of its 1 sequences"):
        SFTDataset(prefix, "valid", "1,0,0", None, 10, seed=0)
    with pytest.raises(UserError, match="give --tokenizer-name-or-path"):
        only(prefix, reset_position_ids=True)
    with IndexedWriter(f"{prefix}_packed_labels_document") as writer:
        writer.add_document([1])
    with pytest.raises(UserError, match="sequence lengths differ"):
        only(prefix)
    assert len(IndexedDataset(f"{prefix}_packed_labels_document")) == 1
