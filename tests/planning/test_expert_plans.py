"""Plans of mixtures of experts: what a rank holds and sends when ranks share experts."""

from __future__ import annotations

import math

import pytest

from tandem.__main__ import main
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid, held_shards
from tandem.parallel.layout import Layout, even_rows
from tandem.planning.job import Job
from tandem.planning.memory import stage_weights
from tandem.planning.traffic import stage_traffic

LAYOUTS = [
    (Layout(expert_model_parallel_size=8), 8),
    (Layout(pipeline_model_parallel_size=4, expert_model_parallel_size=4), 4),
    (Layout(tensor_model_parallel_size=4, pipeline_model_parallel_size=2, expert_model_parallel_size=2), 2),
    (Layout(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1), 4),
    (Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=1), 2),
    (Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2, moe_tp_extend_ep=True), 4),
    (Layout(), 1),
]


@pytest.mark.parametrize(("layout", "data"), LAYOUTS, ids=str)
def test_a_rank_holds_what_is_planned(layout: Layout, data: int) -> None:
    """The weights of the first rank of each stage, and the rows of them that it updates."""
    config = qwen3_config("30B-A3B")
    job = Job(config=config, layout=layout, data_parallel_size=data, use_distributed_optimizer=True, half=True)
    grid = Grid(layout, job.devices)
    for stage in range(job.pipeline_size):
        place = next(place for rank in range(grid.size) if (place := grid.place(rank)).pipeline == stage)
        held = held_shards(config, grid, place)
        assert stage_weights(job, stage).total == sum(math.prod(shard.shape) for shard in held)
        updated = 0
        for shard in held:
            rows, *rest = shard.shape
            copies = grid.copies(shard.spec, place)[0] if data > 1 else 1
            updated += even_rows(rows, copies, 0)[1] * math.prod(rest)
        assert stage_weights(job, stage, job.optimizer_split).total == updated


def test_tokens_travel_to_experts_and_back() -> None:
    """Eight ranks: seven of eight rows go elsewhere. A row is 2048 bf16 numbers there and back, and a factor there."""
    config = qwen3_config("30B-A3B")
    job = Job(
        config=config,
        layout=Layout(expert_model_parallel_size=8),
        data_parallel_size=8,
        global_batch_size=16,
        half=True,
    )
    sent = stage_traffic(job, 0).experts
    micro_batches, layers, passes, rows = 2, 48, 2, 4096 * 8
    assert sent == micro_batches * layers * passes * rows * (2 * 2048 + 1) * 2 * 7 / 8
    whole = Job(config=config, data_parallel_size=8, global_batch_size=16, half=True)
    assert stage_traffic(whole, 0).experts == 0
    experts = 48 * 128 * 3 * 2048 * 768
    saved = stage_traffic(whole, 0).data - stage_traffic(job, 0).data
    assert saved == pytest.approx(experts * 8 * 7 / 8, rel=1e-6)  # nobody else holds a rank's experts


def test_the_plan_of_a_layout_with_experts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "qwen3-30b-a3b", "--pipeline-model-parallel-size", "4", "--data-parallel-size", "4", "--bf16"]
    words += ["--use-distributed-optimizer", "--global-batch-size", "128"]
    assert main([*words, "--expert-model-parallel-size", "4"]) == 0
    assert "experts" in capsys.readouterr().out
    assert main([*words, "--expert-model-parallel-size", "3"]) == 2
    assert "the model's 128 experts do not divide over 3 ranks: give 1, 2, 4" in capsys.readouterr().err
    assert main([*words, "--expert-model-parallel-size", "8"]) == 2
    assert "--expert-model-parallel-size 8: the 4 processes of a pipeline stage" in capsys.readouterr().err
    assert main([*words, "--expert-model-parallel-size", "4", "--use-torch-fsdp2", "--ai-framework", "torch"]) == 2
    assert "--use-torch-fsdp2 shards experts" in capsys.readouterr().err
    alone = ["plan", "qwen3-30b-a3b", "--bf16", "--hardware", "910b", "--tensor-model-parallel-size", "4"]
    assert main([*alone, "--expert-tensor-parallel-size", "1"]) == 0  # gradients travel, though one data rank is there
    assert "gradients" in capsys.readouterr().out
