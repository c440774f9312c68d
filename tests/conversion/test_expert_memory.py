"""To convert takes memory for a few experts, however many there are.

Memory is a process's own: how much its resident set grows at most (VmHWM) in a conversion, after a first one of a toy.
The page cache is not part of it, and no file is mapped into memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_toys
from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.files.large_file import TOGETHER
from tandem.models.config import ModelConfig
from toys import moe_config

MIB = 1 << 20
PER_FILE = 8 * MIB  # what waits to be written
BOUND = 24 * MIB  # besides: what was read ahead, and a few experts

CONVERT = """
import json, sys, tandem

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) << 10

def growth(source, target, settings):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins again
    before = memory("VmRSS")
    tandem.convert(source, target, no_verify=True, **settings)
    return memory("VmHWM") - before

print(json.dumps([growth(*conversion) for conversion in json.loads(sys.argv[1])]))
"""
BACK = {"load_model_type": "mg", "save_model_type": "hf"}
FORMS: dict[str, dict[str, object]] = {
    "native": {"ckpt_format": "native"},
    "sequential": {"ckpt_format": "torch"},
    "grouped": {"ckpt_format": "torch", "moe_grouped_gemm": True},
    "te": {"ckpt_format": "torch", "moe_grouped_gemm": True, "transformer_impl": "transformer_engine"},
}
# how many files, and the options
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "tp2 ep2": (4, {"target_tensor_parallel_size": 2, "target_expert_parallel_size": 2}),
    "ep64": (64, {"target_expert_parallel_size": 64}),
}


def sized(num_experts: int, width: int = 512) -> ModelConfig:
    """Experts of 0.75 MiB in bf16."""
    sizes: dict[str, object] = {"num_layers": 1, "hidden_size": 256, "vocab_size": 256}
    return moe_config(sizes, num_experts=num_experts, moe_ffn_hidden_size=width)


def growths(*conversions: tuple[Path, Path, dict[str, object]]) -> list[int]:
    """By how many bytes each of some conversions, in one process, makes it grow."""
    given = json.dumps([(str(source), str(target), settings) for source, target, settings in conversions])
    done = subprocess.run([sys.executable, "-c", CONVERT, given], capture_output=True, text=True, check=True)
    grown: list[int] = json.loads(done.stdout)
    print(f"grew by {', '.join(f'{size / MIB:.1f}' for size in grown)} MiB")
    return grown


def written(root: Path, num_experts: int) -> tuple[Path, Path]:
    """Hugging Face folders of a toy, and of a model with so many experts."""
    for name, config in (("toy", sized(64, 2)), ("model", sized(num_experts))):
        copy(RandomSource(config, 0, "bfloat16"), HFSink(root / name / "hf", config, "bfloat16", Companions()))
    return root / "toy", root / "model"


def same_weights(left: Path, right: Path) -> bool:
    return (left / "model.safetensors").read_bytes() == (right / "model.safetensors").read_bytes()


def check_bound(root: Path, num_experts: int, files: int, settings: dict[str, object]) -> None:
    """Memory stays a fraction of a layer of experts in both directions, and what returns are the same bits."""
    bound = BOUND + min(files * PER_FILE, TOGETHER)
    assert num_experts * 0.75 * MIB >= 3 * bound
    toy, model = written(root, num_experts)
    ways = [((at / "hf", at / "mg", settings), (at / "mg", at / "back", BACK)) for at in (toy, model)]
    assert max(growths(*ways[0], *ways[1])[2:]) < bound
    assert same_weights(model / "hf", model / "back")


def test_a_layer_of_experts_is_never_in_memory(tmp_path: Path) -> None:
    check_bound(tmp_path, 128, 1, FORMS["grouped"])


@pytest.mark.slow("sizes")
@pytest.mark.parametrize(
    ("form", "layout"), [*((form, "tp2 ep2") for form in FORMS), ("grouped", "ep64"), ("native", "ep64")]
)
def test_experts_of_many_times_the_bound(form: str, layout: str, tmp_path: Path) -> None:
    """The layer is 288 MiB large."""
    files, ranks = LAYOUTS[layout]
    check_bound(tmp_path, 384, files, {**FORMS[form], **ranks})


@pytest.mark.slow("sizes")
def test_distributed_checkpoints_of_many_times_the_bound(tmp_path: Path) -> None:
    """torch writes all experts of a layer as one tensor."""
    pytest.importorskip("torch")
    toy, model = written(tmp_path, 384)
    for folder, config in ((toy, sized(64, 2)), (model, sized(384))):
        source = RandomSource(config, 0, "bfloat16")
        distributed_toys.write(folder / "mg", distributed_toys.by_layer(source), source, params_dtype="bfloat16")
    assert growths(*((at / "mg", at / "back", BACK) for at in (toy, model)))[1] < BOUND + PER_FILE
    assert same_weights(model / "hf", model / "back")
