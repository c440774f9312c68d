"""Tensor ranks and pipeline stages: each rank of a Megatron-core job loads its own file of what is written here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ours import our_logits
from toy_work import toy_batch, toy_weights

from launchers import launcher
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import MEGATRON, TORCH_DIST
from tandem.checkpoints.megatron.sink import MegatronSink, pad_vocab_size
from tandem.models.config import ModelConfig
from tandem.models.tensors import tensor_table
from tandem.parallel.layout import Layout
from toys import moe_config, toy_config

JOB = Path(__file__).with_name("mcore_job.py")
UNTIED = {"untie_embeddings_and_output_weights": True}
Case = tuple[ModelConfig, Layout]


def case(
    tp: int,
    pp: int,
    vpp: int | None = None,
    layers: tuple[int, ...] | None = None,
    chunks: tuple[int, ...] | None = None,
    ep: int = 1,
    config: ModelConfig | None = None,
    **changes: object,
) -> Case:
    layout = Layout(
        expert_model_parallel_size=ep,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=vpp,
        num_layer_list=layers,
        layers_of_chunks=chunks,
    )
    sizes = {"num_layers": sum(chunks or (4,)), "num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 6}
    return config or toy_config(**sizes, **changes), layout


# By the number of ranks: one job serves all of a number.
CASES: dict[int, dict[str, Case]] = {
    2: {
        "tp2": case(2, 1),
        "pp2": case(1, 2),
        "ep2": case(1, 1, ep=2, config=moe_config(mlp_only_layers=(0,))),
        "pp2-virtual": case(1, 2, vpp=1, **UNTIED),
        "tp2-experts": case(2, 1, config=moe_config()),
        "pp2-virtual-uneven": case(1, 2, chunks=(1, 2, 1, 2)),
    },
    4: {
        "tp4": case(4, 1, model_type="qwen2"),
        "pp4": case(1, 4, **UNTIED),
        "tp2-pp2": case(2, 2),
        "tp2-pp2-untied": case(2, 2, **UNTIED),
        "tp2-pp2-qwen2": case(2, 2, model_type="qwen2"),
        "tp2-pp2-llama": case(2, 2, model_type="llama", **UNTIED),
        "tp2-pp2-virtual": case(2, 2, vpp=1),
        "tp2-pp2-virtual-untied": case(2, 2, vpp=1, **UNTIED),
        "tp2-pp2-uneven": case(2, 2, layers=(1, 3)),
    },
}


@pytest.mark.slow("jobs")
@pytest.mark.parametrize("ranks", list(CASES))
def test_every_rank_loads_its_file_and_all_compute_the_model(megatron: object, ranks: int, tmp_path: Path) -> None:
    """Logits as in one process here, and what the ranks save again, in either format, holds the same bits."""
    batch = toy_batch(toy_config(), (40,))
    np.save(tmp_path / "tokens.npy", batch.tokens.astype(np.int64))
    for name, (config, layout) in CASES[ranks].items():
        rows = pad_vocab_size(config.vocab_size, 16, layout.tensor_model_parallel_size)
        copy(toy_weights(config), MegatronSink(tmp_path / name, config, layout, "float32", padded_vocab_size=rows))
    words = [str(JOB), str(tmp_path / "tokens.npy"), *(str(tmp_path / name) for name in CASES[ranks])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher("torch", ranks, forked=True), *words], check=True, timeout=600, env=environment)
    for name, (config, layout) in CASES[ranks].items():
        shares = [np.load(tmp_path / name / f"logits_{rank}.npy") for rank in range(layout.tensor_model_parallel_size)]
        logits = np.concatenate(shares, axis=1)[:, : config.vocab_size]
        source = toy_weights(config)
        np.testing.assert_allclose(logits, our_logits(source, batch), atol=1e-4, rtol=0, err_msg=name)
        for saved in ("again", "distributed", "by_layer"):
            again = open_source(tmp_path / name / saved, config=config)
            assert again.format is (MEGATRON if saved == "again" else TORCH_DIST)
            for tensor in tensor_table(config):
                np.testing.assert_array_equal(again.read(tensor), source.read(tensor), err_msg=f"{name} {tensor}")
