"""Reading pickles without executing them. What a pickle names is replaced by something harmless, or refused.

No class that a pickle names is imported, and no function that it names is called.
"""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import UserError

# Names of Python's own library that trainers store, among much that runs commands or code. They become `Inert`.
INERT_STANDARD = {
    *("_codecs.encode", "_io.BytesIO", "io.BytesIO", "copyreg._reconstructor", "builtins.object"),
    *("builtins.range", "builtins.slice", "builtins.complex", "builtins.bytearray", "builtins.type"),
    *("builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.bytes", "builtins.tuple"),
    *("builtins.len", "builtins.min", "builtins.max", "builtins.sum", "builtins.abs"),
    *("functools.partial", "collections.deque", "collections.Counter", "decimal.Decimal", "fractions.Fraction"),
    *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "uuid.UUID"),
    *("datetime.datetime", "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone"),
    *("signal.SIGINT", "signal.SIGTERM", "signal.SIGUSR1", "signal.SIGUSR2", "signal.Signals", "enum.auto"),
}
# torch's layers, functions and metadata. The rest of torch could load files and code.
INERT_TORCH = (
    *("torch.nn.", "torch.optim.", "torch._C._nn.", "torch.distributed.checkpoint.", "torch._C.Generator"),
    *("torch.device", "torch.serialization._get_layout", "torch.memory_format", "torch._VariableFunctions."),
    *("torch.distributed._shard.", "torch.distributed.fsdp.", "torch.distributed.tensor.", "torch.Generator"),
)
# What the unpickler, or a function that it calls, raises for a damaged pickle.
PICKLE_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, OverflowError, MemoryError, RecursionError),
)


class Inert:
    """In place of an object whose class is not loaded, or of a function. It keeps only the name of the class."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None:
        """For classes that are dicts."""

    def append(self, item: object) -> None:
        """For classes that are lists."""

    def extend(self, items: object) -> None:
        """The same."""

    def add(self, item: object) -> None:
        """For classes that are sets."""


class Record:
    """In place of an object of a known class: what was pickled of it, mostly a dict of its attributes."""

    state: Any = None

    def __new__(cls, *args: object) -> Record:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Dict(dict):
    """In place of OrderedDict and defaultdict."""

    def __setstate__(self, state: object) -> None:
        """Attributes of a module's state dict (`_metadata`) are not needed here."""


class _Namespace(argparse.Namespace):
    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _ordered_dict() -> dict:
    return _Dict()


def _default_dict(factory: object = None) -> dict:
    return _Dict()


PLAIN: dict[str, Any] = {
    "argparse.Namespace": _Namespace,
    "types.SimpleNamespace": _Namespace,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": frozenset,
    "builtins.frozenset": frozenset,
    "builtins.dict": _ordered_dict,
    "builtins.list": list,
    "torch.Size": tuple,
}


def unpickle(
    data: bytes,
    path: Path,
    place: str,
    known: Mapping[str, Any],
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The values in a pickle: dicts, lists, tuples, numbers, strings, `argparse.Namespace`, and what `known` makes.

    Args:
        path, place: the file, and in words where in it the pickle is; for messages.
        known: full names of classes and functions -> what is used in their place.
        persistent_load: makes a value of a persistent id. Without it such an id is an error.

    Raises:
        UserError: the pickle is damaged, or it names something that is not allowed, which is then named.
    """
    try:
        _check_opcodes(data)
        return _Unpickler(data, path, {**PLAIN, **known}, persistent_load).load()
    except UserError:
        raise
    except PICKLE_ERRORS as error:
        raise UserError(f"{path}: damaged: {place} cannot be read: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Replaces a global by something of this module, or refuses it.

    Every class handed out defines `__setstate__`, so that a pickle cannot set attributes on the class itself.
    """

    def __init__(
        self, data: bytes, path: Path, known: Mapping[str, Any], persistent_load: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path, self._known, self._persistent_load = path, known, persistent_load

    def find_class(self, module: str, name: str) -> Any:
        # protocol 2, torch's own, writes the names of Python 2
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if _is_harmless(full):
            return type(name, (Inert,), {"__module__": module})
        raise UserError(
            f"{self._path}: refused: the file asks for {full}, which is neither a tensor nor a plain value. "
            f"No code was run. Save it again with tensors and plain values only"
        )

    def persistent_load(self, identifier: Any) -> Any:
        if self._persistent_load is None:
            raise pickle.UnpicklingError(f"a persistent id, {identifier!r}")
        return self._persistent_load(identifier)


def _is_harmless(full: str) -> bool:
    """Whether a name may be replaced by `Inert`.

    Nothing is run either way. But a checkpoint that asks for a command of the system is not what it seems to be.
    """
    package = full.split(".")[0]
    if package == "torch":
        return full.startswith(INERT_TORCH)
    return full in INERT_STANDARD if package in sys.stdlib_module_names else True


def _check_opcodes(data: bytes) -> None:
    """Raise UnpicklingError when an opcode is cut short, or asks for more memory than the file can need.

    The unpickler grows its memo to any index that the file gives.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(data):
            raise pickle.UnpicklingError(f"memo index {argument} in {len(data)} bytes")
