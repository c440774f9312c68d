"""Evaluation: the exact mean over a set's tokens, whatever the batches; several sets; `tandem evaluate`."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tandem.__main__ import main
from tandem.config.parsing import from_dict
from tandem.data.batch import MicroBatch, Sample
from tandem.data.datasets.questions import read_questions
from tandem.data.indexed import IndexedDataset
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.evaluate import evaluate_weights
from tandem.training.evaluation import Choices, evaluate
from tandem.training.feed import Share
from tandem.training.logs.metrics import METRICS_FILE, read_metrics
from tandem.training.objectives import Evaluation
from tandem.training.run import train
from tandem.training.start.data_paths import named_sets
from workspace import Workspace


class Lengths:
    """Sample i has i + 1 tokens, all trained."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: Callable[[int], object] = lambda index: None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.read(index)
        tokens = np.full(index + 1, index, np.int32)
        return Sample(tokens, tokens, np.arange(index + 1, dtype=np.int32), (index + 1,))

    def describe(self) -> dict[str, int]:
        return {}


class IdsAsLosses:
    """An engine whose loss of a token is its id."""

    def __init__(self, reads_ahead: bool = False) -> None:
        self.reads_ahead = reads_ahead

    def evaluate(self, micro_batches: list[MicroBatch]) -> tuple[float, int]:
        return (
            float(sum(batch.tokens.sum() for batch in micro_batches)),
            sum(len(batch.tokens) for batch in micro_batches),
        )


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_every_sample_counts_once_over_all_ranks(micro: int, data_size: int, count: int) -> None:
    """No tail dropped, no sample twice, also where ranks get different numbers of micro-batches."""
    data, batch = Lengths(count), micro * data_size * 2
    seen = []
    for rank in range(data_size):
        share = Share(micro, data_size, rank)
        for first in range(0, count, batch):
            for micro_batch in share.micro_batches(data, first, min(batch, count - first)):
                seen += [int(token) for token in np.unique(micro_batch.tokens)]
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_the_mean_is_over_tokens_and_bounded_by_batches(reads_ahead: bool) -> None:
    data, engine = Lengths(5), IdsAsLosses(reads_ahead)
    expected = sum(i * (i + 1) for i in range(5)) / 15
    readers = {}
    data.read = lambda index: readers.setdefault(index, threading.current_thread().name)
    whole = evaluate(engine, data, "x", Share(2), 4, None)  # type: ignore[arg-type]
    assert [name == "MainThread" for name in readers.values()] == [True] * 4 + [not reads_ahead]
    assert (whole.loss, whole.tokens) == (expected, 15)
    assert evaluate(engine, data, "x", Share(2), 2, 1) == Evaluation(2 / 3, 3)  # type: ignore[arg-type]
    assert evaluate(engine, data, "x", Share(1), 2, 99) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "named"), [(["a", "b"], "NAME=PREFIX"), (["a=x", "a=y"], "the name 'a'"), (["=x"], "NAME=PREFIX")]
)
def test_wrong_names_of_sets(words: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        named_sets(words)


def test_several_sets_are_reported_separately(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same whole set at each evaluation, so that the same weights give the same loss."""
    text = f"{workspace.text}_text_document"
    settings = workspace.settings(
        "torch",
        train_iters=2,
        lr=0.0,
        lr_warmup_iters=0,
        save=str(tmp_path),
        eval_interval=1,
        eval_iters="full",
        valid_data_path=[f"first={text}", f"second={text}"],
    )
    train(settings)
    first, second = (line["validation"] for line in read_metrics(tmp_path / METRICS_FILE))
    assert first == second
    assert first["first"] == first["second"]
    lines = re.findall(r"validation loss at iteration 1 on (\w+) \| lm loss value", capsys.readouterr().out)
    assert lines == ["first", "second"]


def windows(prefix: str, length: int) -> list[np.ndarray]:
    """A prefix's documents end to end, in file order, in windows that share a token; the last one is shorter."""
    data = IndexedDataset(prefix)
    stream = np.concatenate([np.asarray(data.get(i)) for i in range(len(data))])
    return [stream[i : i + length + 1] for i in range(0, len(stream) - 1, length)]


def test_the_loss_is_hugging_faces(workspace: Workspace, framework: str) -> None:
    """On a set of one document, whose windows no shuffling moves across a border."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    single = one_document(workspace)
    settings = from_dict(
        {
            "load": str(workspace.hf),
            "valid_data_path": single,
            "ai_framework": framework,
            "seq_length": 32,
            "micro_batch_size": 3,
            "eval_iters": "full",
        },
        "test",
    )
    (result,) = evaluate_weights(settings)[0].values()
    model = transformers.AutoModelForCausalLM.from_pretrained(workspace.hf, dtype=torch.float32)
    total, tokens = 0.0, 0
    for window in windows(single, 32):
        ids = torch.tensor(window[None].astype(np.int64))
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-3)


QUESTIONS = [
    {"context": "Reversed, 123 is", "choices": [" 321", " 231.", " 123 again"], "answer": 0},
    {"context": "Which digit of 907 is largest? ", "choices": ["9", "0", "7"], "answer": 2},
]


def write_questions(path: Path) -> str:
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n\n")
    return str(path)


def test_log_likelihoods_are_hugging_faces(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """As lm-evaluation-harness asks them: white space before a choice is part of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = write_questions(tmp_path / "q.jsonl")
    values = {"load": str(workspace.hf), "valid_data_path": file, "ai_framework": framework, "seq_length": 64}
    (result,) = evaluate_weights(from_dict(values, "test"))[0].values()
    model = transformers.AutoModelForCausalLM.from_pretrained(workspace.hf, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workspace.hf)
    likelihoods, right, right_per_character = [], 0, 0
    for question in QUESTIONS:
        choice_likelihoods = []
        for choice in question["choices"]:
            ids = tokenizer.encode(question["context"] + choice, return_tensors="pt")
            begin = len(tokenizer.encode(question["context"].rstrip()))
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(dim=-1)
            choice_likelihoods.append(float(sum(logs[i - 1, ids[0, i]] for i in range(begin, ids.shape[1]))))
        answer = question["answer"]
        right += max(choice_likelihoods) == choice_likelihoods[answer]
        scores = [value / len(choice) for value, choice in zip(choice_likelihoods, question["choices"])]
        right_per_character += max(scores) == scores[answer]
        likelihoods.append(choice_likelihoods[answer])
    assert isinstance(result, Choices)
    assert result.log_likelihood == pytest.approx(sum(likelihoods) / 2, abs=1e-4)
    assert (result.questions, result.accuracy, result.accuracy_per_character) == (2, right / 2, right_per_character / 2)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ('{"a": "text"}', "field 'context'"),
        ('{"text": "a"}', "a row of plain text, and not a question: preprocess it first"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "from 0 to 1"),
        ('{"context": " ", "choices": ["b", "c"], "answer": 1}', "expected text before the choices"),
        ('{"context": "' + 99 * "a b " + '", "choices": ["b", "c"], "answer": 1}', "--seq-length is 64"),
    ],
)
def test_a_bad_question_is_named(workspace: Workspace, tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line)
    with pytest.raises(UserError, match=f"q.jsonl:2: .*{named}"):
        read_questions(file, Tokenizer(workspace.hf), 64)


def one_document(workspace: Workspace) -> str:
    """The prefix of a set whose only document is not a whole number of windows."""
    from tandem.data.preprocess.options import PreprocessOptions
    from tandem.data.preprocess.run import preprocess

    prefix = workspace.root / "single"
    if not Path(f"{prefix}_text_document.idx").exists():
        text = " ".join(workspace.corpus.read_text().split())[:1500]
        source = workspace.root / "single.txt"
        source.write_text(text + "\n")
        preprocess(PreprocessOptions((str(source),), str(prefix), str(workspace.hf), append_eod=True))
    return f"{prefix}_text_document"


def test_the_command_takes_text_and_instructions_at_once(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [f"text={workspace.text}_text_document", f"chat={workspace.instructions}"]
    assert main(["evaluate", str(workspace.hf), *sets, "--seq-length", "32", "--micro-batch-size", "8"]) == 0
    rows = re.findall(r"│ (text|chat) +│ +([\d.]+) │ +([\d.]+) │ +([\d,]+) │", capsys.readouterr().out)
    assert [row[0] for row in rows] == ["text", "chat"]
    assert all(float(row[2]) == pytest.approx(math.exp(float(row[1])), rel=1e-3) for row in rows)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no weights: give"),
        (["HF"], "no data: give"),
        (["HF", "/no/data", "--seq-length", "32"], "/no/data"),
        (["HF", "/no/data"], "--seq-length 4096 is above max_position_embeddings 512: give --seq-length 512, or less"),
        (["/no/model", "x"], "/no/model"),
        (["HF", "x", "--context-parallel-size", "2"], "--context-parallel-size 2: only 1 is supported"),
    ],
)
def test_the_command_names_what_is_missing(
    workspace: Workspace, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *[word.replace("HF", str(workspace.hf)) for word in words]]) == 2
    assert named in capsys.readouterr().err
