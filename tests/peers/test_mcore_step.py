"""From the same files and weights, Megatron-core's dataset and model give the loss and the gradients of ours."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from mcore_data import EOD, FLAGS, SEED, SEQUENCE, SPLIT, corpus, megatron_datasets
from toy_work import assert_close_gradients, mean_gradients, toy_weights

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.copy import copy
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.data.batch import collate
from tandem.data.datasets.text import GPTDataset
from tandem.parallel.layout import Layout
from toys import DENSE_TOYS

SAMPLES = 4


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "reset"])
@pytest.mark.parametrize("model", DENSE_TOYS)
def test_loss_and_every_gradient_are_megatrons(
    mcore: ModuleType, framework: str, model: str, flags: bool, tmp_path: Path
) -> None:
    """With `--reset-attention-mask`, Megatron masks what is packed here, and turns by other angles: only distances
    count."""
    source = toy_weights(DENSE_TOYS[model])
    prefix = corpus(tmp_path / "x", 50, source.config.vocab_size)

    copy(source, MegatronSink(tmp_path / "mg", source.config, Layout(), "float32"))
    (chunk,) = mcore.load(tmp_path / "mg")
    theirs, *_ = megatron_datasets([prefix], [SAMPLES, 0, 0], flags=flags)
    batch = torch.utils.data.default_collate([theirs[i] for i in range(SAMPLES)])
    losses = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    expected_loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    expected_loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in chunk.named_parameters()}

    ours = GPTDataset(prefix, "train", SPLIT, SAMPLES, SEQUENCE, SEED, EOD, **dict.fromkeys(FLAGS, flags))
    engine = create_engine(framework, source.config, EngineSettings(device="cpu"))
    engine.load_weights(source)
    loss, gradients = mean_gradients(engine, [collate([ours[i] for i in range(SAMPLES)])])
    assert loss == pytest.approx(expected_loss.item(), abs=1e-5)
    assert set(gradients) == set(expected)
    assert_close_gradients(gradients, {name: expected[name] for name in gradients}, rtol=1e-4)
