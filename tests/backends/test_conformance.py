"""Both backends are built alike: the same files, and the same signatures where one stands for the other."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from parts import import_part

import tandem.backends
from tandem.backends.interface import Engine, EngineSettings
from toys import TOYS

BACKENDS = Path(tandem.backends.__file__).parent

# Files of one backend alone: what the other's framework does itself.
ALONE = {
    "mindspore/buckets.py",  # collectives over many tensors
    "mindspore/documents.py",  # what attention is given of a batch
    "mindspore/memory.py",  # tensors with undefined contents
    "mindspore/npu_adapters.py",  # what adapters compute on NPUs
    "mindspore/npu_feeding.py",  # what NPUs get from the host, and give back
    "mindspore/npu_loss.py",  # the head and its loss on NPUs
    "mindspore/npu_optimizer.py",  # the norm and AdamW on NPUs
    "mindspore/npu_session.py",  # attention over kept keys on NPUs
    "mindspore/products.py",  # products of matrices on CPU
    "mindspore/threads.py",  # NumPy work over all cores
    "mindspore/weight.py",  # parameters with gradient buffers, and pullbacks
    "torch/ahead.py",  # what passes wait for, asked for one pass early
    "torch/cpu.py",  # what a CPU computes with
    "torch/cpu_experts.py",  # the same of experts
    "torch/cuda.py",  # what NVIDIA's devices compute with
    "torch/cuda_experts.py",  # the same of experts
    "torch/fused.py",  # functions that are compiled
    "torch/overlap.py",  # what data ranks send while passes compute
    "torch/pure.py",  # what is compiled
    "torch/fully_sharded.py",  # --use-torch-fsdp2
    "torch/transformers_model.py",  # the reference of --verify
}


def files(framework: str) -> set[str]:
    """MindSpore's kernels stand in a folder of their own, `compute`."""
    return {path.name for path in (BACKENDS / framework).rglob("*.py")}


def public(module: ModuleType) -> dict[str, object]:
    """The functions and classes that `module` defines under public names."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def test_the_same_files(both_frameworks: tuple[str, str]) -> None:
    torch_files, mindspore_files = ({f for f in files(name) if f"{name}/{f}" not in ALONE} for name in both_frameworks)
    assert torch_files == mindspore_files


@pytest.mark.parametrize("module", ["engine", "loss"])
def test_functions_of_the_same_name_take_the_same(module: str, both_frameworks: tuple[str, str]) -> None:
    first, second = (public(import_part(name, module)) for name in both_frameworks)
    for name in first.keys() & second.keys():
        if inspect.isfunction(first[name]) and inspect.isfunction(second[name]):
            actual, expected = (list(inspect.signature(value).parameters) for value in (second[name], first[name]))
            assert actual == expected, f"{module}.{name}"
    if module == "engine":
        assert "create" in first.keys() & second.keys()


def test_the_engine_has_the_interface(framework: str) -> None:
    module = importlib.import_module(f"tandem.backends.{framework}.engine")
    engine = module.create(TOYS["qwen3-tied"], EngineSettings(device="cpu"))
    assert list(inspect.signature(module.create).parameters) == ["config", "settings"]
    for name in Engine.__annotations__:
        assert hasattr(engine, name), name
    methods = [name for name, value in vars(Engine).items() if inspect.isfunction(value) and not name.startswith("_")]
    for name in methods:
        actual, expected = (inspect.signature(getattr(owner, name)) for owner in (type(engine), Engine))
        assert list(actual.parameters.values()) == list(expected.parameters.values()), name
        assert actual.return_annotation == expected.return_annotation, name
