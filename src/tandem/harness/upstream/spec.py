"""A task of lm-evaluation-harness whose questions come from a file here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.harness.upstream.files import Row

Splits = Mapping[str, Callable[[], list[Row]]]  # name of a part -> reads its rows


@dataclass(frozen=True)
class Spec:
    """A task.

    Attributes:
        name: of lm-evaluation-harness's task, or of a new one, of which `changes` are everything.
        splits: the questions, and the solved examples.
        changes: what is different in the task.
        notice: for the user; "" for none.
    """

    name: str
    splits: Splits
    changes: Mapping[str, Any] = field(default_factory=dict)
    notice: str = ""

    @property
    def is_new(self) -> bool:
        return "output_type" in self.changes

    def config(self) -> dict[str, Any]:
        """The task as lm-evaluation-harness takes it in a group."""

        def load(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {name: Dataset.from_list(read()) for name, read in self.splits.items()}

        return {"task": self.name, "custom_dataset": load, **self.changes}
