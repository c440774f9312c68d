"""Preferences as they are written: the prompt masked, the answers with labels, in upstream's and TRL's way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_toys import byte_tokenizer, options, write_jsonl
from tandem.__main__ import main
from tandem.data.batch import IGNORE
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import PreprocessSummary, preprocess
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


# --- TRL's rows, and TRL's tokens


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TRL_PAIRS: list[dict[str, Any]] = [
    {"prompt": [user("Q")], "chosen": [answer("good")], "rejected": [answer("bad one")]},
    {"chosen": [user("Q"), answer("good")], "rejected": [user("Q"), answer("bad")]},
    {
        "prompt": [{"role": "system", "content": "S"}, user("1"), answer("one"), user("2")],
        "chosen": [answer("two", reasoning_content="hm")],
        "rejected": [answer("three")],
    },
    {"prompt": [user("Q")], "chosen": [CALL], "rejected": [answer("no")], "tools": TOOLS},
    {
        "prompt": [user("Q")],
        "chosen": [answer("yes")],
        "rejected": [answer("no")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.<|im_end|>"},
    {"chosen": "Human: Hi\n\nAssistant: I am.", "rejected": "Human: Hi\n\nAssistant: It is."},
]


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    """Byte tokens, with the chat template of Qwen3 that TRL ships."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    folder = byte_tokenizer(tmp_path / "tokenizer")
    source = Path(found.origin).parent / "chat_templates" / "qwen3.jinja"
    (folder / "chat_template.jinja").write_text(source.read_text())
    return folder


def written_pair(tmp_path: Path, tokenizer: Path, record: dict[str, Any]) -> dict[str, tuple[list[int], list[bool]]]:
    """By side, the ids of a row, and which of them have labels."""
    prompt_type = "empty" if isinstance(record["chosen"], str) else "chat_template"
    source = write_jsonl(tmp_path / "x.jsonl", record)
    summary = preprocess(options(source, tmp_path / "x", tokenizer, prompt_type=prompt_type))
    found = {}
    for side in ("chosen", "rejected"):
        ids, labels = (IndexedDataset(summary.prefixes[f"{side}_{what}"])[0] for what in ("input_ids", "labels"))
        found[side] = (ids.tolist(), (labels != IGNORE).tolist())
    return found


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("record", TRL_PAIRS)
def test_tokens_are_those_of_trl(record: dict[str, Any], shared_data: Path, tmp_path: Path) -> None:
    """Same tokens. TRL counts all that follows the prompt; here an answer begins after the template's empty thought and
    ends with its end token, and a word that two texts begin with belongs to the answers."""
    datasets = pytest.importorskip("datasets")
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.dpo_trainer import DPOTrainer

    qwen3 = shared_data / "qwen3-0.6b"
    peer = PreTrainedTokenizerFast.from_pretrained(qwen3)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = datasets.Dataset.from_list([record])
    (expected,) = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=peer), rows, peer, arguments, "train")
    for side, (ids, trained) in written_pair(tmp_path, qwen3, record).items():
        assert ids == expected["prompt_ids"] + expected[f"{side}_ids"]
        ours = [token for token, is_trained in zip(ids, trained) if is_trained]
        theirs = peer.decode(expected[f"{side}_ids"])
        text = peer.decode(ours)
        if isinstance(record["chosen"], str):
            assert text.endswith(theirs)
            assert text.removesuffix(theirs) in ("", " I")
        else:
            assert text == theirs.removeprefix("<think>\n\n</think>\n\n").removesuffix("\n")


def test_trl_rows_end_with_the_end_token(qwen3: Path, tmp_path: Path) -> None:
    """As above, without TRL itself."""
    reader = Tokenizer(qwen3)
    texts = []
    for record in TRL_PAIRS:
        pair = written_pair(tmp_path, qwen3, record)
        texts.append([reader.decode(np.array(ids)[trained].tolist()) for ids, trained in pair.values()])
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    expected = [("good", "bad one"), ("good", "bad"), ("<think>\nhm\n</think>\n\ntwo", "three"), (call, "no")]
    expected += [("yes", "no"), (" blue.", " green."), (" I am.", " It is.")]
    assert texts == [[f"{text}<|im_end|>" for text in pair] for pair in expected]


def made(tmp_path: Path, tokenizer: Path, *records: Any, **changes: Any) -> PreprocessSummary:
    return preprocess(options(write_jsonl(tmp_path / "x.jsonl", *records), tmp_path / "x", tokenizer, **changes))


def test_what_pairs_teach_is_counted_and_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "Q", "chosen": "same", "rejected": "same"},
        {"prompt": "Q", "chosen": THOUGHT + "good", "rejected": "bad"},
        {"prompt": "Q", "chosen": "good", "rejected": THOUGHT + "bad"},
        {"prompt": "Q", "chosen": THOUGHT + "good", "rejected": THOUGHT + "bad"},
        {"prompt": "Q", "chosen": THOUGHT + "good", "rejected": THOUGHT + "bad"},
        {"prompt": "Q", "chosen": "", "rejected": "x" * 300},
    ]
    for mode in ("none", "true"):
        summary = made(tmp_path, folder, *rows, prompt_type="qwen3", seq_length=300, enable_thinking=mode)
        assert summary.dropped == {"longer than seq_length": 1}
        assert summary.noticed == {"equal answers": 1, "one thought": 2, "texts": 6, "empty": 1, "repeated": 1}
    words = ["--input", str(tmp_path / "x.jsonl"), "--output-prefix", str(tmp_path / "y"), "--prompt-type", "qwen3"]
    assert main(["preprocess", *words, "--tokenizer-name-or-path", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "read with PreferenceHandler, recognised by the first record, with prompt type qwen3\n" in out
    assert "> pairs whose chosen and rejected answers are equal, which teach nothing: 1\n" in out
    assert "> pairs of an answer with a thought and one without, which teach to think or not to think: 2\n" in out
    assert "(--prompt-type empty adds nothing to them): 6\n" in out


def test_all_answers_after_the_prompt_are_trained(folder: Path, tmp_path: Path) -> None:
    record = {"chosen": [user("Q"), answer("a"), user("more"), answer("b")], "rejected": [user("Q"), answer("c")]}
    summary = made(tmp_path, folder, record, prompt_type="qwen3")
    labels = IndexedDataset(summary.prefixes["chosen_labels"])[0]
    assert Tokenizer(folder).decode(labels[labels != IGNORE].tolist()) == "a<|im_end|>\nb<|im_end|>\n"
    unlearned = {"prompt": [user("Q")], "chosen": [answer("good")], "rejected": [answer("bad", weight=0)]}
    assert made(tmp_path, folder, record, unlearned, prompt_type="qwen3").dropped == {"nothing left to train": 1}


def test_unpaired_answers_are_shown_with_their_label(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "Q", "completion": text, "label": text == "good"} for text in ("good", "bad", "bad")]
    source = write_jsonl(tmp_path / "x.jsonl", *rows, {**rows[0], "label": "maybe"})
    words = ["--input", str(source), "--output-prefix", str(tmp_path / "x"), "--tokenizer-name-or-path", str(folder)]
    assert main(["preprocess", *words, "--prompt-type", "qwen3"]) != 0
    wrong = capsys.readouterr()
    assert (
        f"{source}:4: field 'label': expected true (the answer is desirable) or false, found str 'maybe'" in wrong.err
    )
    assert main(["preprocess", *words, "--prompt-type", "qwen3", "--on-bad", "skip"]) == 0
    out = capsys.readouterr().out
    assert "read with UnpairedPreferenceHandler, recognised" in out
    assert "> desirable answers: 1\n> undesirable answers: 2\n" in out
    assert main(["inspect", "data", str(tmp_path / "x"), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert "sample 0 completion, completion_desirable 1 " in shown
    assert "sample 1 completion, completion_desirable 0 " in shown
    assert "[[good<|im_end|>" in shown


def test_texts_without_a_prompt_need_a_way_to_be_written(folder: Path, tmp_path: Path) -> None:
    record = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    with pytest.raises(UserError, match=r"x\.jsonl:1: chosen and rejected are texts.*give --prompt-type empty"):
        made(tmp_path, folder, record, prompt_type="qwen3")
    with pytest.raises(UserError, match="prompt type empty has no thinking modes"):
        made(tmp_path, folder, record, prompt_type="empty", enable_thinking="true")
    tools = {"prompt": [user("Q")], "chosen": [CALL], "rejected": [answer("no")]}
    with pytest.raises(UserError, match="prompt type empty writes texts alone"):
        made(tmp_path, folder, tools, prompt_type="empty")
    summary = made(tmp_path, folder, record, prompt_type="empty")
    assert summary.noticed == {}
    view = DataView(tmp_path / "x")
    assert [span.text for span in view.spans(1, Tokenizer(folder))] == ["The sky is", " green.<|im_end|>"]


def test_texts_of_a_tokenizer_that_begins_them(tmp_path: Path) -> None:
    """The beginning stands once, before the first text. Conversations have their answers trained, and all text else."""
    import json

    folder = byte_tokenizer(tmp_path / "tokenizer")
    path = folder / "tokenizer.json"
    begins = {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {"<|endoftext|>": begins},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": processor}))
    chat = {"messages": [user("a"), answer("b"), user("c"), answer("d")]}
    summary = made(tmp_path, folder, chat, prompt_type="empty")
    ids, labels = (IndexedDataset(summary.prefixes[key])[0] for key in ("input_ids", "labels"))
    reader = Tokenizer(folder)
    assert reader.decode(ids) == "<|endoftext|>ab<|im_end|>cd<|im_end|>"
    assert reader.decode(labels[labels != IGNORE]) == "b<|im_end|>d<|im_end|>"
    template = get_template("empty", None, reader)
    from tandem.data.templates.messages import Message

    assert template.generation_prompt([Message("user", "a")]) == ("<|endoftext|>", "a")
