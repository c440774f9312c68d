"""`tandem inspect checkpoint`: every format is recognised and described, damage is found."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorKind
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.models.tensors import parameter_count, tensor_table
from tandem.parallel.layout import Layout
from toys import moe_config, toy_config

CONFIG = toy_config(num_layers=4, vocab_size=212)
LAYOUT = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, noop_layers=(0, 5))


def write_hf(folder: Path) -> Path:
    copy(RandomSource(CONFIG, 3, "bfloat16"), HFSink(folder, CONFIG, "bfloat16", Companions()))
    return folder / "model.safetensors"


def write_megatron(folder: Path) -> Path:
    copy(RandomSource(CONFIG, 3, "bfloat16"), MegatronSink(folder, CONFIG, LAYOUT, "bfloat16"))
    return folder / "iter_0000001/mp_rank_01_001/model_optim_rng.pt"


def write_native(folder: Path, iteration: int = 1) -> Path:
    kinds: dict[TensorKind, str] = {"model": "bfloat16", "exp_avg": "float32", "exp_avg_sq": "float32"}
    documents = {"trainer_state.json": "{}"}
    sink = NativeSink(folder, CONFIG, LAYOUT, kinds, iteration, Companions(), documents)
    for kind, dtype in kinds.items():
        for name in tensor_table(CONFIG):
            sink.write(name, RandomSource(CONFIG, 3, dtype).read(name), kind)
    sink.close()
    return folder / f"iter_{iteration:07d}/mp_rank_01_001/optimizer.safetensors"


WRITERS = {"Hugging Face": write_hf, "Megatron torch": write_megatron, "native": write_native}


def test_experts_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, layout = moe_config(), Layout(expert_model_parallel_size=2)
    copy(RandomSource(config, 3), MegatronSink(tmp_path / "c", config, layout, "bfloat16", moe_grouped_gemm=True))
    assert main(["inspect", "checkpoint", str(tmp_path / "c")]) == 0
    output = capsys.readouterr().out
    for expected in ("qwen3_moe", "expert_model_parallel_size 2", "mp_rank_00_001", f"{parameter_count(config):,}"):
        assert expected in output


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_is_described(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = WRITERS[form](tmp_path / "c")
    assert main(["inspect", "checkpoint", str(tmp_path / "c")]) == 0
    output = capsys.readouterr().out
    numbers = parameter_count(CONFIG)
    for expected in (form, "qwen3, embeddings tied", f"{numbers:,}", "bfloat16", f"{2 * numbers:,}"):
        assert expected in output
    assert hashlib.sha256(file.read_bytes()).hexdigest() in output
    if form != "Hugging Face":
        assert "tensor_model_parallel_size 2, pipeline_model_parallel_size 3, noop_layers (0, 5)" in output
    has_optimizer = "exp_avg_sq" in output
    assert has_optimizer is (form == "native")


def described_optimizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", "checkpoint", str(folder), "--quick"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ optimizer "))
    return line.split("│")[2].strip()


def test_whether_the_optimizer_is_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    write_native(tmp_path / "native")
    assert described_optimizer(tmp_path / "native", capsys) == "yes: exp_avg, exp_avg_sq"
    file = write_megatron(tmp_path / "megatron")
    assert described_optimizer(tmp_path / "megatron", capsys) == "no"
    (file.parent / "distrib_optim.pt").write_bytes(b"")
    assert described_optimizer(tmp_path / "megatron", capsys) == "yes, in distrib_optim.pt; it is not read here"
    for path in tmp_path.glob("megatron/iter_*/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        torch.save({**content, "optimizer": {"state": {}}}, path)
    expected = "yes, in model_optim_rng.pt and distrib_optim.pt; it is not read here"
    assert described_optimizer(tmp_path / "megatron", capsys) == expected


def test_iterations_are_listed_and_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(tmp_path, 10)
    write_native(tmp_path, 20)
    assert main(["inspect", "checkpoint", str(tmp_path), "--ckpt-step", "10", "--quick"]) == 0
    output = capsys.readouterr().out
    assert "iter_0000010 (also here: iter_0000020)" in output
    assert "trainer_state.json" in output
    assert "sha256" not in output


@pytest.mark.parametrize("form", ["Megatron torch", "native"])
def test_damage_is_found(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = WRITERS[form](tmp_path / "c")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["inspect", "checkpoint", str(tmp_path / "c"), "--quick"]) == 0
    assert main(["inspect", "checkpoint", str(tmp_path / "c")]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [(["checkpont", "x"], "did you mean 'checkpoint'"), ([], "expected")])
def test_a_wrong_subject_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err
