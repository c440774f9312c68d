"""Pickles that would execute code, or point outside their storage, are refused."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_torch_file import archive_with

from tandem.checkpoints.formats.torch_reader import load
from tandem.errors import UserError

torch = pytest.importorskip("torch")

BF16 = np.dtype(ml_dtypes.bfloat16)


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self._call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, f"{os.system.__module__}.system"), (eval, "eval"), (getattr, "getattr"), (subprocess.Popen, "Popen")],
)
def test_hostile_globals_are_refused_by_name_and_not_executed(
    tmp_path: Path, protocol: int, function: Any, name: str
) -> None:
    marker = tmp_path / "executed"
    argument = f"touch {marker}" if function is not eval else f"open({str(marker)!r}, 'w').close()"
    hidden = {"args": argparse.Namespace(deep=[{"x": Hostile(function, argument, "x")}]), "model": {}}
    torch.save(hidden, tmp_path / "m.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=rf"m\.pt: refused: the file asks for .*{name}"):
        load(tmp_path / "m.pt")
    assert not marker.exists()


def test_a_call_hidden_in_an_accepted_object_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    inner = Hostile(os.system, f"touch {marker}")
    torch.save({"state": Hostile(OrderedDict, inner)}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"refused: the file asks for .*system"):
        load(tmp_path / "m.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        # an attribute set on a class that the reader hands out
        b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02cargparse\nNamespace\nN}X\x06\x00\x00\x00__eq__K\x01s\x86b.",
        b"\x80\x02cmegatron\nX\nN}X\x06\x00\x00\x00__eq__K\x01s\x86b.",
        # dotted names that protocol 4 would walk along
        b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.",
        b"\x80\x04\x8c\x05torch\x8c\x0dserialization\x93.",
        # a tensor without a storage, a storage of no known kind, nonsense
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR.",
        b"\x80\x02(X\x06\x00\x00\x00moduleNX\x01\x00\x00\x000NK\x01tQ.",
        b"\x80\x02K\x01Q.",
        # a memo of 16 GB
        b"\x80\x02K\x01r\x00\x00\x00\x7f.",
        b"\x80\x02]",
        b"",
    ],
)
def test_hand_made_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    before = dict(vars(argparse.Namespace))
    with pytest.raises(UserError, match=r"m\.pt"):
        load(archive_with(tmp_path / "m.pt", data))
    assert dict(vars(argparse.Namespace)) == before


def tensor_pickle(numel: int, shape: tuple, strides: tuple, offset: int) -> bytes:
    """The pickle of one tensor, as `torch.save` lays it out."""
    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value is storage else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(Hostile(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("numel", "shape", "strides", "offset"),
    [
        (4, (3, 2), (2, 1), 0),  # longer than the storage
        (4, (2, 2), (2, 1), 1),
        (4, (2,), (-1,), 3),
        (4, (2, 2), (2,), 0),
        (4, (2,), (1.0,), 0),
        (9, (2,), (1,), 0),  # a storage longer than the file's
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path: Path, numel: int, shape: tuple, strides: tuple, offset: int
) -> None:
    path = archive_with(tmp_path / "m.pt", tensor_pickle(numel, shape, strides, offset), data__0=bytes(16))
    with pytest.raises(UserError, match=r"m\.pt: damaged"):
        load(path)
