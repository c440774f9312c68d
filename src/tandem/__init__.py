"""Tandem: train Qwen3 end to end on MindSpore and on PyTorch, from the same files.

>>> import tandem
>>> tandem.preprocess("text.jsonl", "run/text", "qwen3-0.6b", append_eod=True)  # doctest: +SKIP
>>> tandem.pretrain(load="qwen3-0.6b", data_path="run/text_text_document", save="run/pretrained", ...)  # doctest: +SKIP
>>> tandem.load("run/pretrained").generate("Hello")  # doctest: +SKIP

The functions are those of `tandem.api`; they and what they need are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tandem.version import __version__

if TYPE_CHECKING:
    from tandem.api import (
        convert,
        evaluate,
        export,
        finetune,
        inspect,
        load,
        merge,
        plan,
        preprocess,
        pretrain,
        train,
        verify,
    )
    from tandem.config.settings import Settings
    from tandem.errors import RunStopped, UserError

__all__ = [
    "RunStopped",
    "Settings",
    "UserError",
    "__version__",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "merge",
    "plan",
    "preprocess",
    "pretrain",
    "train",
    "verify",
]
_ELSEWHERE = {"Settings": "tandem.config.settings", "RunStopped": "tandem.errors", "UserError": "tandem.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ELSEWHERE.get(name, "tandem.api")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
