"""Exams with lettered choices, in a file per subject: MMLU, C-Eval, CMMLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tandem.harness.upstream.files import Row, letter, read_table
from tandem.harness.upstream.spec import Spec

LETTERS = "ABCD"
SHOTS = 5


@dataclass(frozen=True)
class Exam:
    """One of the exams.

    Attributes:
        base: lm-evaluation-harness's task of a subject.
        suffix: of the files that hold questions; the rest of a file's name is the subject.
        dev: the same subject's file in the folder `dev` next to it, which holds solved examples.
        split: what lm-evaluation-harness calls the questions.
    """

    base: str
    suffix: str
    dev: str
    read: Callable[[Path], list[Row]]
    split: str

    def specs(self, folder: Path) -> list[Spec]:
        """A task for each subject in the folder."""
        return [self._spec(path) for path in sorted(folder.glob(f"*{self.suffix}"))]

    def _spec(self, path: Path) -> Spec:
        subject = path.name.removesuffix(self.suffix)
        examples = path.resolve().parent.parent / "dev" / self.dev.format(subject=subject)
        name, splits = self.base.format(subject=subject), {self.split: partial(self.read, path)}
        if examples.is_file():
            shots = min(SHOTS, len(self.read(examples)))
            return Spec(name, {**splits, "dev": partial(self.read, examples)}, {"num_fewshot": shots})
        notice = f"{examples.parent} lacks {examples.name}: its questions are asked without solved examples"
        return Spec(name, splits, {"num_fewshot": 0, "fewshot_split": None}, notice)


def _mmlu(path: Path) -> list[Row]:
    rows = read_table(path, ("question", *LETTERS, "answer"), has_header=False)
    return [
        {
            "question": row["question"],
            "choices": [row[name] for name in LETTERS],
            "answer": letter(row["answer"], LETTERS, f"{path}: row {number}"),
        }
        for number, row in enumerate(rows, start=1)
    ]


def _lettered(question: str, answer: str) -> Callable[[Path], list[Row]]:
    def read(path: Path) -> list[Row]:
        rows = read_table(path, (question, *LETTERS, answer), has_header=True)
        for number, row in enumerate(rows, start=2):
            letter(row[answer], LETTERS, f"{path}: row {number}")
        return rows

    return read


MMLU = Exam("mmlu_{subject}", "_test.csv", "{subject}_dev.csv", _mmlu, "test")
C_EVAL = Exam("ceval-valid_{subject}", "_val.csv", "{subject}_dev.csv", _lettered("question", "answer"), "val")
CMMLU = Exam("cmmlu_{subject}", ".csv", "{subject}.csv", _lettered("Question", "Answer"), "test")
