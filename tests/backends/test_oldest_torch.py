"""What the oldest PyTorch that Tandem takes lacks: nothing is used without looking for it, and the rest works.

`python tests/backends/test_oldest_torch.py`, with that PyTorch, records its names again.
"""

from __future__ import annotations

import ast
import importlib
import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_toys import run_step_by_step

import tandem
from tandem.backends.torch.compute import cpu_experts, cuda_experts
from tandem.frameworks import TORCH

RECORDED = Path(__file__).with_name("oldest_torch.txt")
SOURCES = sorted(Path(tandem.__file__).parent.rglob("*.py"))
NOT_TORCH = ("torch.npu",)  # torch_npu puts it there


def used(path: Path) -> Iterator[str]:
    """The names of PyTorch's that a module imports, or writes as attributes of what it imports."""
    text = path.read_text()
    if "torch" not in text:
        return
    tree = ast.parse(text)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [one for one in node.names if is_torch(one.name)]
            known |= {one.asname or "torch": one.name if one.asname else "torch" for one in names}
        elif isinstance(node, ast.ImportFrom) and is_torch(node.module or ""):
            known |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    yield from known.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in known and rest.replace(".", "").isidentifier():
                yield f"{known[first]}.{rest}"


def is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def all_used() -> set[str]:
    names = {name for path in SOURCES for name in used(path)}
    return {name for name in names if name != "torch" and not name.startswith(NOT_TORCH)}


def recorded() -> dict[str, set[str]]:
    """What each module, class or name space of the oldest PyTorch has."""
    lines = RECORDED.read_text().split("\n\n")
    return {owner: set(names.split()) for owner, _, names in (line.partition(":") for line in lines)}


def test_no_name_is_newer_than_the_oldest_pytorch() -> None:
    has = recorded()
    newer = {name for name in all_used() if name.rpartition(".")[2] not in has.get(name.rpartition(".")[0], ())}
    version = ".".join(map(str, TORCH.first_version))
    todo = f"look for them with getattr, or, if it has them, run this file with PyTorch {version} to record them"
    assert not newer, f"PyTorch {version} is not known to have these: {todo}"


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> SimpleNamespace:
    """`cuda_experts`, imported by a PyTorch that lacks some names of grouped products."""
    for name in names:
        owner, _, last = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(owner), last, raising=False)
    return SimpleNamespace(**runpy.run_path(str(cuda_experts.__file__)))


def for_hopper_alone(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("torch._grouped_mm is only supported on CUDA devices with compute capability = 9.0")


@pytest.mark.parametrize("has", ["no grouped product", "a private one", "one for Hopper alone"])
def test_experts_need_no_grouped_product_of_pytorchs(has: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10 it is private, in 2.8 for Hopper alone, and before 2.8 it is absent."""
    if has == "a private one" and not hasattr(torch, "_grouped_mm"):
        pytest.skip("this PyTorch is an old one itself, and has none")
    run_step_by_step(monkeypatch)
    if has == "one for Hopper alone":
        monkeypatch.setattr(torch, "_grouped_mm", for_hopper_alone, raising=False)
    old = without(monkeypatch, "torch.nn.functional.grouped_mm", *["torch._grouped_mm"] * (has == "no grouped product"))
    assert (old._grouped_mm(torch.device("cpu"), torch.float32) is None) == (has != "a private one")
    counts = torch.tensor([3, 0, 2])
    x, weight, gradient = (torch.randn(shape) for shape in ((5, 16), (24, 16), (5, 8)))
    results = []
    for kernels in (cpu_experts, old):
        groups, target = kernels.groups(counts), torch.zeros(24, 16)
        kernels.add_grouped_product(target, True, gradient, x, groups)
        results.append((kernels.grouped_product(x, weight, groups), target))
    torch.testing.assert_close(*results)


if __name__ == "__main__":
    has: dict[str, set[str]] = {}
    for name in sorted(all_used()):
        owner, _, last = name.rpartition(".")
        resolve_name(name)  # raises for a newer one; some are there, but in no `dir`
        has.setdefault(owner, {one for one in dir(resolve_name(owner)) if not one.startswith("__")}).add(last)
    lines = (f"{owner}: {' '.join(sorted(names))}" for owner, names in has.items())
    RECORDED.write_text("\n\n".join(textwrap.fill(line, 120, break_on_hyphens=False) for line in lines) + "\n")
