"""Placement of layers and slices: every layer once, every element once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING, OUTPUT, tensor_table
from tandem.parallel.layout import Layout, shards
from toys import toy_config


def layers_of(layout: Layout, num_layers: int) -> list[list[list[int]]]:
    return [[[slot.layer for slot in chunk] for chunk in stage] for stage in layout.stages(num_layers)]


def test_virtual_stages_follow_megatron() -> None:
    layout = Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert layers_of(layout, 8) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    ("noop", "local"),
    [((0, 7), [[1, 2, 3], [0, 1, 2]]), ((6, 7), [[0, 1, 2, 3], [0, 1]]), ((3, 7), [[0, 1, 2], [0, 1, 2]])],
)
def test_noop_layers_keep_their_slots(noop: tuple[int, ...], local: list[list[int]]) -> None:
    """The cases that MindSpeed-LLM's converter was run on: six layers, two stages."""
    stages = Layout(pipeline_model_parallel_size=2, noop_layers=noop).stages(6)
    assert [[slot.local for slot in chunk] for stage in stages for chunk in stage] == local
    assert [slot.layer for stage in stages for chunk in stage for slot in chunk] == list(range(6))


def test_uneven_stages() -> None:
    assert layers_of(Layout(pipeline_model_parallel_size=2, num_layer_list=(1, 3)), 4) == [[[0]], [[1, 2, 3]]]


@given(layers=st.integers(1, 40), pp=st.integers(1, 8), data=st.data())
@settings(max_examples=200, deadline=None)
def test_each_layer_on_exactly_one_stage(layers: int, pp: int, data: st.DataObject) -> None:
    """For even stages with noop layers, virtual stages, and uneven lists."""
    short = -layers % pp
    noop = tuple(data.draw(st.permutations(range(layers + short)))[:short])
    layouts = [Layout(pipeline_model_parallel_size=pp, noop_layers=noop)]
    if layers >= pp:
        cuts = sorted(data.draw(st.permutations(range(1, layers)))[: pp - 1])
        counts = tuple(int(n) for n in np.diff([0, *cuts, layers]))
        layouts.append(Layout(pipeline_model_parallel_size=pp, num_layer_list=counts))
    if layers % (2 * pp) == 0:
        chunk = layers // (2 * pp)
        layouts.append(Layout(pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=chunk))
    for layout in layouts:
        assert sorted(layer for stage in layers_of(layout, layers) for chunk in stage for layer in chunk) == list(
            range(layers)
        )


@pytest.mark.parametrize("pp", range(1, 9))
def test_what_does_not_divide_is_balanced(pp: int) -> None:
    """Every layer on one stage, stages that differ by one at most, the last and the first among the smallest."""
    for layers in range(pp, 41):
        layout = Layout(pipeline_model_parallel_size=pp).balanced(layers)
        held = [[layer for chunk in stage for layer in chunk] for stage in layers_of(layout, layers)]
        assert [layer for stage in held for layer in stage] == list(range(layers))
        counts = [len(stage) for stage in held]
        assert max(counts) - min(counts) <= 1
        assert counts[-1] == min(counts)
        assert layers % pp == pp - 1 or counts[0] == min(counts)
        assert (layout.num_layer_list is None) == (layers % pp == 0)


def test_fewer_layers_than_stages_do_not_divide() -> None:
    layout = Layout(pipeline_model_parallel_size=4)
    assert layout.balanced(3) is layout
    with pytest.raises(UserError, match="do not divide"):
        layout.stages(3)
    with pytest.raises(UserError, match="--num-layer-list 1,2,2,1, or"):
        layout.stages(6)


def test_a_layout_that_fixes_its_stages_stays() -> None:
    for options in ({"noop_layers": (0,)}, {"num_layer_list": (1, 4)}, {"num_layers_per_virtual_pipeline_stage": 1}):
        layout = Layout(pipeline_model_parallel_size=2, **options)
        assert layout.balanced(5) is layout


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_slices_tile_every_tensor(tp: int, pp: int, tied: bool) -> None:
    config = toy_config(
        num_layers=4,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=211,  # a prime: the last rank holds fewer rows
        untie_embeddings_and_output_weights=not tied,
    )
    layout = Layout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    covered = {name: np.zeros(spec.shape, int) for name, spec in tensor_table(config).items()}
    for shard in shards(config, layout, tied_head_copy=False):
        assert shard.shape[0] > 0
        for box in shard.part.boxes:
            covered[shard.spec.name][tuple(slice(*interval) for interval in box)] += 1
    for name, spec in tensor_table(config).items():
        assert (covered[name] == (1 if spec.split.dim is not None else tp)).all(), name


def test_gate_and_up_are_cut_separately() -> None:
    config = toy_config(ffn_hidden_size=8)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    parts = [
        shard.part.boxes
        for shard in shards(config, Layout(tensor_model_parallel_size=2), tied_head_copy=False)
        if shard.spec.name == name
    ]
    rows = [[box[0] for box in boxes] for boxes in parts]
    assert rows == [[(0, 4), (8, 12)], [(4, 8), (12, 16)]]


def test_tied_head_copy_only_on_the_last_of_several_stages() -> None:
    config = toy_config(num_layers=2)
    for pp, homes in ((1, [(0, EMBEDDING)]), (2, [(0, EMBEDDING), (1, OUTPUT)])):
        layout = Layout(pipeline_model_parallel_size=pp)
        places = [
            (s.pipeline_rank, s.local_name)
            for s in shards(config, layout, tied_head_copy=True)
            if s.spec.name == EMBEDDING
        ]
        assert places == homes


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"pipeline_model_parallel_size": 2}, "3 layers"),
        ({"tensor_model_parallel_size": 4}, "num_query_groups 2"),
        ({"pipeline_model_parallel_size": 2, "num_layer_list": (1, 1)}, "--num-layer-list 1,1: .* such as 2,1"),
        (
            {"pipeline_model_parallel_size": 2, "num_layer_list": (1, 2), "noop_layers": (0,)},
            "1,2 and --noop-layers exclude",
        ),
        ({"pipeline_model_parallel_size": 3, "num_layers_per_virtual_pipeline_stage": 1}, "virtual"),
        ({"noop_layers": (9,)}, "--noop-layers 9: expected different numbers from 0 to 3"),
    ],
)
def test_impossible_layouts_are_named(layout: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        shards(toy_config(), Layout(**layout), tied_head_copy=False)
