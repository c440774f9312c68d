"""Experts in Megatron's files: three layouts, any ranks, and back without the change of a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.megatron.names import shards_of
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part, cut
from toys import moe_config

CONFIG = moe_config({"vocab_size": 212}, mlp_only_layers=(0,))
FORMS = {
    "sequential": {},
    "grouped": {"moe_grouped_gemm": True},
    "transformer engine": {"moe_grouped_gemm": True, "transformer_engine": True},
}
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2 etp1": Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=1),
    "ep4": Layout(expert_model_parallel_size=4),
    "tp2 pp2 ep2": Layout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        num_layer_list=(1, 2),
        expert_model_parallel_size=2,
    ),
    "tp2 ep4 etp1": Layout(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1),
    "tp2 ep2 extended": Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2, moe_tp_extend_ep=True),
    "noop": Layout(pipeline_model_parallel_size=2, noop_layers=(3,), expert_model_parallel_size=2),
}


def write(folder: Path, layout: Layout, **form: bool) -> RandomSource:
    source = RandomSource(CONFIG, 3)
    copy(source, MegatronSink(folder, CONFIG, layout, "float32", **form))
    return source


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_experts_return_bit_identical(form: str, layout: str, tmp_path: Path) -> None:
    """Also where the config is known from the files' args alone."""
    source = write(tmp_path / "mg", LAYOUTS[layout], **FORMS[form])
    for path in (tmp_path / "mg").rglob("hf/*"):
        path.unlink()
    next((tmp_path / "mg").rglob("hf")).rmdir()
    back = open_source(tmp_path / "mg")
    assert back.config == CONFIG
    for name in tensor_table(CONFIG):
        assert np.array_equal(back.read(name), source.read(name)), name


@pytest.mark.parametrize("form", [*FORMS, "native"])
def test_any_part_of_experts_is_that_of_the_whole(form: str, tmp_path: Path) -> None:
    """Also where it begins and ends within an expert, and as ranks of other layouts ask for it."""
    layout, source = LAYOUTS["tp2 pp2 ep2"], RandomSource(CONFIG, 3)
    if form == "native":
        copy(source, NativeSink(tmp_path, CONFIG, layout, {"model": "float32"}, 1, Companions()))
    else:
        write(tmp_path, layout, **FORMS[form])
    back, random = open_source(tmp_path), np.random.default_rng(0)
    for name in ("decoder.layers.2.mlp.experts.linear_fc1.weight", "decoder.layers.2.mlp.experts.linear_fc2.weight"):
        whole = source.read(name)
        bounds = np.sort([[random.integers(0, size + 1, 2) for size in whole.shape] for _ in range(10)]).tolist()
        parts = [Part(((tuple(rows), tuple(columns)),)) for rows, columns in bounds]
        for other in ("one", "tp2", "ep4", "tp2 ep2 extended"):
            parts += [shard.part for shard in shards_of(CONFIG, LAYOUTS[other])[name]]
        for part in parts:
            assert np.array_equal(back.read_part(name, part), cut(whole, part)), (name, part)


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_expert_is_found_after_its_last_block(form: str, tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["ep4"], **FORMS[form])
    name = "decoder.layers.1.mlp.experts.linear_fc1.weight"
    expert = RandomSource(CONFIG, 3).read(name).reshape(8, -1, 48)[5]
    path = next(tmp_path.rglob("mp_rank_00_002/model_optim_rng.pt"))
    content = path.read_bytes()
    number = (expert.T if form == "grouped" else expert).tobytes()[-4:]
    assert content.count(number) == 1
    path.write_bytes(content.replace(number, number[::-1]))
    source, damaged = open_source(tmp_path), Part((((5 * 48, 6 * 48), (0, 48)),))
    for part in (damaged, Part.whole((8 * 48, 48))):
        with pytest.raises(UserError, match=r"mp_rank_00_002/.*weight is damaged: its CRC"):
            source.read_part(name, part)
    others = Part((((0, 4 * 48), (0, 48)),))  # of other ranks
    assert np.array_equal(source.read_part(name, others), RandomSource(CONFIG, 3).read(name)[: 4 * 48])


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Folder of a rank -> its tensors, by torch."""
    return {
        path.parent.name: torch.load(path, weights_only=False)["model"]
        for path in sorted(folder.rglob("model_optim_rng.pt"))
    }


def test_names_and_shapes_of_each_layout(tmp_path: Path) -> None:
    """Expert J of expert rank e is number e * 4 + J; a tensor rank has half of gate and half of up."""
    layout = Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    for form, settings in FORMS.items():
        source = write(tmp_path / form, layout, **settings)
        stored = files(tmp_path / form)
        assert list(stored) == [f"mp_rank_0{tensor}_00{expert}" for tensor in range(2) for expert in range(2)]
        rank = stored["mp_rank_01_001"]
        fc1 = source.read("decoder.layers.1.mlp.experts.linear_fc1.weight").reshape(8, 2, 24, 48)[5]
        fc2 = source.read("decoder.layers.1.mlp.experts.linear_fc2.weight").reshape(8, 48, 24)[5]
        fc1, fc2 = fc1[:, 12:].reshape(24, 48), fc2[:, 12:]  # of expert 5, that is J = 1, the second half
        experts = "decoder.layers.1.mlp.experts."
        if form == "grouped":
            weight1, weight2 = rank[f"{experts}weight1"], rank[f"{experts}weight2"]
            assert (tuple(weight1.shape), tuple(weight2.shape)) == ((48, 4 * 24), (4 * 12, 48))
            first, second = weight1.view(4, 48, 24)[1].T, weight2.view(4, 12, 48)[1].T
        elif form == "sequential":
            first, second = (rank[f"{experts}local_experts.1.linear_fc{number}.weight"] for number in (1, 2))
        else:
            first, second = (rank[f"{experts}linear_fc{number}.weight1"] for number in (1, 2))
        assert np.array_equal(first.numpy(), fc1)
        assert np.array_equal(second.numpy(), fc2)
        assert np.array_equal(
            rank["decoder.layers.1.mlp.router.weight"].numpy(), source.read("decoder.layers.1.mlp.router.weight")
        )
        is_fused = form == "transformer engine"
        assert ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in rank) == is_fused  # a layer without experts
        assert "decoder.layers.1.pre_mlp_layernorm.weight" in rank


def test_a_rank_of_experts_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["ep4"])
    (tmp_path / "iter_0000001/mp_rank_00_002").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"missing: mp_rank_00_002; .* x 4 expert ranks"):
        open_source(tmp_path)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS["one"])
    path = next(tmp_path.rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    del content["model"]["decoder.layers.1.mlp.experts.local_experts.6.linear_fc2.weight"]
    torch.save(content, path)
    with pytest.raises(UserError, match=r"linear_fc2\.weight is there for the experts 0, .*, 7; expected 8"):
        open_source(tmp_path)
