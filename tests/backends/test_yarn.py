"""YaRN as transformers computes it, at every position that it allows, and in every spelling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference, toy_batch, toy_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.data.batch import MicroBatch
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf, to_hf
from tandem.models.rotary import inverse_frequencies
from toys import moe_config, toy_config

LONGEST = 131072
# Qwen3's README: factor 4 of 32768, where max_position_embeddings stays 40960
QWEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
ROPES = {
    "qwen": QWEN,
    "older name": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
    "bounds": QWEN | {"beta_fast": 24, "beta_slow": 2.5, "truncate": False},
    "equal bounds": QWEN | {"beta_fast": 1, "beta_slow": 1, "truncate": False},
    "attention factor": QWEN | {"attention_factor": 1.37},
    "mscale": QWEN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "mscale alone": QWEN | {"mscale": 0.7, "attention_factor": None, "mscale_all_dim": 0},
    "no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 10240},
    "no original": {"rope_type": "yarn", "factor": 3.2},
}


def hf_config(
    rope: dict[str, object], spelling: str = "rope_scaling", sparse: bool = False, **changes: object
) -> dict[str, object]:
    """A toy's config.json as transformers 4 or 5 writes it."""
    changes = {"max_position_embeddings": 40960, **changes}
    hf = to_hf(moe_config(changes) if sparse else toy_config(**changes), dtype="float32")
    theta = hf["rope_theta"]
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        del hf[name]
    if spelling == "rope_scaling":
        return hf | {"rope_theta": theta, "rope_scaling": rope}
    return hf | {"rope_parameters": {"rope_theta": theta, **rope}}


def far_batch(config: ModelConfig) -> MicroBatch:
    """Two texts, whose tokens lie at the ends and everywhere between 0 and LONGEST."""
    batch = toy_batch(config, (24, 9))
    return dataclasses.replace(
        batch,
        position_ids=np.concatenate(
            [np.linspace(0, LONGEST - 1, 24).astype(np.int32), LONGEST - 9 + np.arange(9, dtype=np.int32)]
        ),
    )


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name: str, spelling: str, tmp_path: Path) -> None:
    """To the bit, since at far positions the last one shows. So are those of the config that is written."""
    hf = hf_config(ROPES[name], spelling)
    config = from_hf(hf)
    for content in (hf, to_hf(config, base=hf)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        theirs = AutoConfig.from_pretrained(tmp_path)
        frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
        np.testing.assert_array_equal(inverse_frequencies(config), frequencies.numpy())
        assert config.rotary_scaling is not None
        assert config.rotary_scaling.amplitude == amplitude
    assert from_hf(to_hf(config, base=hf)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "sparse"), [("qwen", False), ("bounds", False), ("mscale", False), ("qwen", True)])
def test_logits_equal_transformers_at_far_positions(framework: str, name: str, sparse: bool, tmp_path: Path) -> None:
    """And the exported folder, opened by transformers, gives them, too. `sparse`: a model with experts."""
    source = toy_weights(from_hf(hf_config(ROPES[name], sparse=sparse, num_layers=2)))
    assert (source.config.experts is not None) == sparse
    batch = far_batch(source.config)
    expected = Reference(source).logits(batch).detach().numpy()
    engine = create_engine(framework, source.config, EngineSettings(device="cpu", training=False))
    engine.load_weights(source)
    logits = engine.logits(batch)
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
    plain = dataclasses.replace(source.config, rotary_scaling=None)
    assert np.abs(Reference(toy_weights(plain)).logits(batch).detach().numpy() - expected).max() > 0.1

    copy(source, HFSink(tmp_path / "hf", source.config, "float32", Companions()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").float()
    with torch.no_grad():
        first = model(
            input_ids=torch.from_numpy(batch.tokens[:24]).long()[None],
            position_ids=torch.from_numpy(batch.position_ids[:24]).long()[None],
        ).logits[0]
    np.testing.assert_allclose(logits[:24], first.numpy(), atol=1e-5, rtol=0)
    assert open_source(tmp_path / "hf").config == source.config


@pytest.mark.parametrize(
    ("rope", "stated", "longest"),
    [
        (QWEN, 40960, LONGEST),
        (QWEN, 200_000, 200_000),
        ({"rope_type": "yarn", "factor": 4.0}, 32768, LONGEST),
        ({"rope_type": "linear", "factor": 4.0}, 32768, 32768),
    ],
)
def test_texts_may_be_as_long_as_the_factor_allows(rope: dict[str, object], stated: int, longest: int) -> None:
    """Whatever max_position_embeddings says: readers of the exported config are told."""
    config = from_hf(hf_config(rope) | {"max_position_embeddings": stated})
    assert config.max_position_embeddings == longest
    assert to_hf(config)["max_position_embeddings"] == longest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"factor": None, "original_max_position_embeddings": None}, "'yarn' has no factor"),
        ({"factor": "4"}, "factor '4' of the rotary scaling: expected a number above 0"),
        ({"attention_factor": -1.0}, "attention_factor -1.0 of the rotary scaling"),
        ({"truncate": "no"}, "truncate 'no' of the rotary scaling: expected true or false"),
        ({"beta_fast": [32]}, r"beta_fast \[32\] of the rotary scaling"),
    ],
)
def test_damaged_scaling_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: .*{named}"):
        from_hf(hf_config(QWEN | change))


def test_spellings_that_scale_otherwise_are_refused() -> None:
    hf = hf_config(QWEN)
    with pytest.raises(UserError, match=r"rope_parameters ask for yarn by 2\.0, rope_scaling for yarn by 4\.0"):
        from_hf(hf | {"rope_parameters": QWEN | {"factor": 2.0}})
