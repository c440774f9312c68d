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

THERE_AND_BACK = """
import json, sys, tandem

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) << 10

def growth(*arguments, **settings):
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins again
    before = memory("VmRSS")
    tandem.convert(*arguments, no_verify=True, **settings)
    return memory("VmHWM") - before

settings = json.loads(sys.argv[1])
for model in sys.argv[2:]:
    there = growth(f"{model}/hf", f"{model}/mg", **settings)
    back = growth(f"{model}/mg", f"{model}/back", load_model_type="mg", save_model_type="hf")
print(json.dumps([there, back]))
"""
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


def check_bound(root: Path, num_experts: int, files: int, settings: dict[str, object]) -> None:
    """Memory stays a fraction of a layer of experts in both directions, and what returns are the same bits."""
    bound = BOUND + min(files * PER_FILE, TOGETHER)
    assert num_experts * 0.75 * MIB >= 3 * bound
    for name, config in (("toy", sized(64, 2)), ("model", sized(num_experts))):
        copy(RandomSource(config, 0, "bfloat16"), HFSink(root / name / "hf", config, "bfloat16", Companions()))
    command = [sys.executable, "-c", THERE_AND_BACK, json.dumps(settings), str(root / "toy"), str(root / "model")]
    grown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"grew by {', '.join(f'{bytes / MIB:.1f}' for bytes in grown)} MiB")
    assert max(grown) < bound
    there, back = (root / "model" / side / "model.safetensors" for side in ("hf", "back"))
    assert there.read_bytes() == back.read_bytes()


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
