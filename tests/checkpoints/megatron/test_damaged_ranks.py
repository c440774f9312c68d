"""Files of Megatron ranks that are damaged, missing, or contradict each other are named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_megatron import TIED, assert_equal, divisible_config, edit, layout, write

from tandem.checkpoints.folders import find_iteration
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.megatron.source import MegatronSource
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING, OUTPUT

torch = pytest.importorskip("torch")


# --- what is amiss is named


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The iteration folder of a tied model at TP2 PP2; its parent is the checkpoint."""
    write(tmp_path, divisible_config(TIED, num_layers=4), layout(tp=2, pp=2))
    return find_iteration(tmp_path)


Change = Callable[[dict], Any]
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
NORM = "decoder.layers.1.input_layernorm.weight"
DAMAGE: dict[str, tuple[Change, str]] = {
    "missing tensor": (
        lambda content: content["model"].pop(QKV),
        rf"missing: mp_rank_01_001/model/{QKV}$",
    ),
    "left over tensor": (
        lambda content: content["model"].update({"decoder.layers.1.mlp.router.weight": torch.ones(2)}),
        r"left over: mp_rank_01_001/model/decoder\.layers\.1\.mlp\.router\.weight$",
    ),
    "missing layer": (
        lambda content: [content["model"].pop(key) for key in list(content["model"]) if ".layers.1." in key],
        rf"missing: .*mp_rank_01_001/model/{QKV}",
    ),
    "tied head absent": (
        lambda content: content["model"].pop(OUTPUT),
        rf"missing: mp_rank_01_001/model/{OUTPUT}$",
    ),
    "wrong shape": (
        lambda content: content["model"].update({QKV: torch.ones(3, 4)}),
        rf"mp_rank_01_001/{FILE}: tensor {QKV} has shape \[3, 4\]; the config implies \[128, 48\]",
    ),
    "other dtype": (
        lambda content: content["model"].update({QKV: content["model"][QKV].float()}),
        rf"mp_rank_01_001/{FILE}: {QKV} is float32; other ranks have another dtype",
    ),
    "not a tensor": (
        lambda content: content["model"].update({QKV: [1.0]}),
        rf"mp_rank_01_001/{FILE}: {QKV} is a list; expected a tensor",
    ),
    "old version": (
        lambda content: content.update(checkpoint_version=2.0),
        rf"mp_rank_01_001/{FILE}: checkpoint_version is 2.0; only 3.0 is read",
    ),
    "no model": (
        lambda content: content.pop("model"),
        rf"mp_rank_01_001/{FILE}: expected model, or model0, model1 and so on; found neither",
    ),
    "other chunks": (
        lambda content: content.update(model0=content.pop("model"), model1={}),
        "has 2 model chunks; .* has 1",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_rank_is_refused_when_opened(checkpoint: Path, damage: str) -> None:
    """Nothing is trained from a partial checkpoint."""
    change, message = DAMAGE[damage]
    edit(checkpoint / "mp_rank_01_001" / FILE, change)
    with pytest.raises(UserError, match=message):
        MegatronSource(checkpoint.parent)


def test_copies_must_be_equal(checkpoint: Path) -> None:
    """Replicated tensors and the tied head."""
    path = checkpoint / "mp_rank_01_001" / FILE
    edit(path, lambda content: content["model"][NORM].add_(1))
    edit(path, lambda content: content["model"][OUTPUT].add_(1))
    source = MegatronSource(checkpoint.parent)
    with pytest.raises(UserError, match=rf"mp_rank_01_001/{FILE}: {NORM} differs from {NORM} in .*mp_rank_00_001"):
        source.read("decoder.layers.3.input_layernorm.weight")
    with pytest.raises(UserError, match=rf"mp_rank_01_001/{FILE}: {OUTPUT} differs from {EMBEDDING} in .*mp_rank_01_0"):
        source.read(EMBEDDING)


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_01_001"])
def test_a_missing_rank_is_named(checkpoint: Path, rank: str) -> None:
    shutil.rmtree(checkpoint / rank)
    with pytest.raises(UserError, match=f"rank folders are missing: {rank}; expected 2 tensor ranks x 2 pipeline"):
        MegatronSource(checkpoint.parent)


def test_a_missing_last_stage_is_known_from_args(checkpoint: Path) -> None:
    for path in checkpoint.glob("mp_rank_*_001"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="rank folders are missing: mp_rank_00_001, mp_rank_01_001"):
        MegatronSource(checkpoint.parent)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    path = checkpoint / "mp_rank_01_000" / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"mp_rank_01_000/{FILE}: truncated or damaged"):
        MegatronSource(checkpoint.parent)


@pytest.mark.parametrize(
    ("field", "value"), [("rotary_base", 12345), ("norm_epsilon", 1e-5), ("hidden_size", 64), ("num_query_groups", 2)]
)
def test_args_that_contradict_the_config_are_refused(checkpoint: Path, field: str, value: float) -> None:
    """Both values are printed."""
    edit(checkpoint / "mp_rank_00_000" / FILE, lambda content: setattr(content["args"], field, value))
    with pytest.raises(UserError, match=f"args say {field} = {value}, the model's config says "):
        MegatronSource(checkpoint.parent)


@pytest.mark.parametrize(
    ("field", "value"), [("rotary_percent", 0.5), ("swiglu", False), ("rope_scaling_type", "longrope")]
)
def test_args_that_change_the_mathematics_are_refused(checkpoint: Path, field: str, value: object) -> None:
    shutil.rmtree(checkpoint / "hf")
    edit(checkpoint / "mp_rank_00_000" / FILE, lambda content: setattr(content["args"], field, value))
    with pytest.raises(UserError, match=f"args say {field} = {value!r}; "):
        MegatronSource(checkpoint.parent)


def test_layers_in_another_order_are_refused_whatever_config_is_given(checkpoint: Path) -> None:
    config = MegatronSource(checkpoint.parent).config
    edit(
        checkpoint / "mp_rank_00_000" / FILE, lambda content: setattr(content["args"], "schedules_method", "dualpipev")
    )
    with pytest.raises(UserError, match="args say schedules_method = 'dualpipev'"):
        MegatronSource(checkpoint.parent, config=config)


def test_the_smallest_checkpoint_needs_a_config(checkpoint: Path) -> None:
    """What Megatron itself needs: version, iteration, model."""
    config = MegatronSource(checkpoint.parent).config
    shutil.rmtree(checkpoint / "hf")
    for path in checkpoint.glob(f"*/{FILE}"):
        edit(path, lambda content: content.pop("args"))
    with pytest.raises(UserError, match="holds no args: the model is unknown"):
        MegatronSource(checkpoint.parent)
    assert_equal(MegatronSource(checkpoint.parent, config=config), RandomSource(config, seed=1, dtype="bfloat16"))


def test_uneven_stages_need_no_args(tmp_path: Path) -> None:
    config = divisible_config()
    source = write(tmp_path, config, layout(pp=3, num_layer_list=(1, 5, 2)))
    for path in find_iteration(tmp_path).glob(f"*/{FILE}"):
        edit(path, lambda content: content.pop("args"))
    assert_equal(MegatronSource(tmp_path, config=config), source)


@pytest.mark.parametrize("counts", [(1, 2, 1, 2), (0, 3, 2, 1), (2, 1, 0, 1, 1, 1)])
def test_uneven_interleaved_stages_need_no_args(counts: tuple[int, ...], tmp_path: Path) -> None:
    """Such as --decoder-first-pipeline-num-layers and --account-for-embedding-in-pipeline-split make them."""
    config = divisible_config(num_layers=6)
    source = write(tmp_path, config, layout(tp=2, pp=2, layers_of_chunks=counts))
    for path in find_iteration(tmp_path).glob(f"*/{FILE}"):
        edit(path, lambda content: content.pop("args"))
    written = MegatronSource(tmp_path, config=config)
    assert written.layout == layout(tp=2, pp=2, layers_of_chunks=counts)
    assert_equal(written, source)
