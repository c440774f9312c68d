"""Adapters of experts and routers against PEFT, over modules as of transformers 4 and over parameters as of 5."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft_model
import pytest
import torch
import transformers
from peft_model import peft  # skips this file where it is not installed
from reference import MemorySource, Reference, toy_weights
from safetensors.numpy import load_file
from test_adapters import assert_logits_equal_peft, batches, engine_of, train, trained_adapters, write_model

from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.adapters.describe import summaries_of, summaries_of_folder
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.peft import PeftSource, unlike_over_transformers_5, write_peft
from tandem.checkpoints.adapters.views import Adapted, Merged
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.errors import UserError
from tandem.models.adapters import check_dropout
from tandem.models.lora import Lora
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap
from toys import moe_config

CONFIG = moe_config(mlp_only_layers=(1,))
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "modules": {"transformers_4": True},
    "some modules": {
        "transformers_4": True,
        "target_modules": ["v_proj", "up_proj", "experts.7.down_proj", *(f"experts.{e}.down_proj" for e in range(7))],
        "rank_pattern": {"up_proj": 3, r"experts\.\d+\.down_proj": 2},
        "alpha_pattern": {r"layers.2.mlp.experts.\d+.down_proj": 5},
        "layers_to_transform": [1, 2],
        "use_rslora": True,
    },
    "parameters": {},
    "both parameters": {
        "target_modules": ["q_proj"],
        "target_parameters": PARAMETERS,
        "rank_pattern": {"down_proj": 2},
    },
    "one parameter": {"target_modules": [], "target_parameters": PARAMETERS[:1], "use_rslora": True},
    "the other parameter": {"target_modules": [], "target_parameters": PARAMETERS[1:]},
}


@pytest.mark.parametrize(
    "kind",
    [
        "modules",
        "parameters",
        *(pytest.param(kind, marks=pytest.mark.slow("jobs")) for kind in ("some modules", "both parameters")),
    ],
)
def test_steps_equal_peft(framework: str, kind: str, tmp_path: Path) -> None:
    model = peft_model.peft_model(write_model(tmp_path / "hf", CONFIG), **KINDS[kind])
    source = open_adapters(peft_model.saved(model, tmp_path / "start"), open_source(tmp_path / "hf"))
    engine, steps = engine_of(framework, source, recompute_layers=2), batches(CONFIG, 6)

    expected = peft_model.train(model, steps, lr=1e-3)
    np.testing.assert_allclose(train(engine, steps, lr=1e-3), expected, atol=1e-5)

    end = PeftSource(peft_model.saved(model, tmp_path / "end"), CONFIG)
    for name, values in trained_adapters(engine).items():
        np.testing.assert_allclose(values, end.read(name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_comes_back_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    model = peft_model.peft_model(write_model(tmp_path / "hf", CONFIG), **KINDS[kind])
    before = peft_model.saved(model, tmp_path / "before")
    source = open_adapters(before, open_source(tmp_path / "hf"))
    write_peft(tmp_path / "after", source, str(tmp_path / "hf"))
    described = summaries_of_folder(before)[1]  # as `tandem inspect` has it, without the model
    assert sorted(described, key=str) == sorted(summaries_of(source), key=str)
    write_peft(
        tmp_path / "again", open_adapters(tmp_path / "after", open_source(tmp_path / "hf")), str(tmp_path / "hf")
    )
    old, new, again = (
        load_file(folder / "adapter_model.safetensors") for folder in (before, tmp_path / "after", tmp_path / "again")
    )
    assert old.keys() == new.keys() == again.keys()
    assert all(old[name].tobytes() == new[name].tobytes() == again[name].tobytes() for name in old)
    if not KINDS[kind].get("transformers_4"):
        assert_opens_alike(tmp_path / "hf", before, tmp_path / "after")


def assert_opens_alike(model: Path, *folders: Path) -> None:
    tokens = torch.arange(1, 12)[None]
    logits = [opened(model, folder)(tokens).logits for folder in folders]
    assert torch.equal(*logits)


def opened(model: Path, folder: Path) -> Any:
    """PEFT's model, over the installed transformers."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("kind", ["modules", "parameters"])
def test_merged_equals_unmerged_and_peft(framework: str, kind: str, tmp_path: Path) -> None:
    model = peft_model.peft_model(write_model(tmp_path / "hf", CONFIG), **KINDS[kind])
    source = open_adapters(peft_model.saved(model, tmp_path / "adapter"), open_source(tmp_path / "hf"))
    assert_logits_equal_peft(framework, source, model)
    state = model.merge_and_unload().state_dict()
    merged, names = Merged(source), WeightMap(CONFIG)
    for name, spec in tensor_table(CONFIG).items():
        if spec.split.experts and kind == "modules":
            for hf, part in names.to_hf(name, merged.read(name)).items():
                np.testing.assert_allclose(part, state[hf].numpy(), atol=1e-6, err_msg=hf)


def test_what_tandem_trains_opens_over_transformers_5(framework: str, tmp_path: Path) -> None:
    """Adapters of modules (`all-linear`), and of Megatron's whole weights, which share one A."""
    base = open_source(write_model(tmp_path / "hf", config := moe_config()))
    steps = batches(config, 2)
    for number, targets in enumerate(("all-linear", ("linear_fc1", "linear_fc2", "router"))):
        lora = dataclasses.replace(config, lora=Lora(r=3, lora_alpha=6, target_modules=targets))
        engine = engine_of(framework, Adapted(FreshAdapters(base, lora, 3), base, base))
        train(engine, steps, lr=3e-3)
        trained = trained_adapters(engine)

        class Trained(FreshAdapters):
            def read(self, name: str, kind: Any = "model") -> np.ndarray:
                return trained[name]  # noqa: B023

        folder = tmp_path / f"peft{number}"
        write_peft(folder, Adapted(Trained(base, lora, 0), base, base), str(tmp_path / "hf"))
        tensors = load_file(folder / "adapter_model.safetensors")
        prefix = "base_model.model.model.layers.0.mlp.experts.5."
        shared = (tensors[f"{prefix}gate_proj.lora_A.weight"] == tensors[f"{prefix}up_proj.lora_A.weight"]).all()
        assert shared == (targets != "all-linear")
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == (
            ["down_proj", "gate", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
            if targets == "all-linear"
            else ["down_proj", "gate", "gate_proj", "up_proj"]
        )
        loss = sum(peft_model.sum_of_losses(opened(tmp_path / "hf", folder), batch) for batch in steps[0]).item()
        assert engine.evaluate(steps[0])[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (Lora(target_modules=r".*experts\.\d+\.\w+_proj"), None),
        (Lora(target_modules=r".*experts\.\d+\.down_proj"), None),
        (Lora(target_modules=r".*experts\.\d+\.(gate|up)_proj"), "without those of down_proj"),
        (Lora(target_modules=r".*experts\.\d+\.gate_proj"), "both, or none"),
        (Lora(target_modules=r".*experts\.\d+\.\w+_proj", use_rslora=True), r"sqrt\(2\) more"),
        (Lora(target_modules="all-linear", rank_pattern=(("up_proj", 2),)), "rank 16 and alpha 32"),
        (Lora(target_modules="all-linear"), "layers without experts"),
    ],
)
def test_what_peft_does_not_open_as_it_is_is_said(lora: Lora, reason: str | None, tmp_path: Path) -> None:
    source = toy_weights(dataclasses.replace(CONFIG, lora=lora))
    weights = {name: source.read(name) for name in tensor_table(CONFIG)}
    copy(MemorySource(CONFIG, {"model": weights}), HFSink(tmp_path / "hf", CONFIG, "float32", Companions()))
    write_peft(tmp_path / "peft", source, str(tmp_path / "hf"))
    tokens = torch.arange(1, 12)[None]
    merged = Reference(Merged(source)).model(tokens).logits
    said = unlike_over_transformers_5(source.config)
    try:
        same = torch.allclose(opened(tmp_path / "hf", tmp_path / "peft")(tokens).logits, merged, atol=1e-4)
    except (ValueError, RuntimeError):
        same = False
    assert same == (said is None)
    assert (said is None) == (reason is None)
    assert reason is None or re.search(reason, said or "")


def test_without_adapters_the_weights_alone_compute(framework: str, tmp_path: Path) -> None:
    base = open_source(write_model(tmp_path / "hf", CONFIG))
    config = dataclasses.replace(CONFIG, lora=Lora(r=3, lora_alpha=6))
    engine = engine_of(framework, Adapted(FreshAdapters(base, config, 3), base, base))
    steps = batches(CONFIG, 3)
    train(engine, steps, lr=3e-3)
    with engine.without_adapters():
        off = engine.log_probabilities(steps[0])
    plain = create_engine(framework, CONFIG, EngineSettings(training=False))
    plain.load_weights(base)
    for values, expected in zip(off, plain.log_probabilities(steps[0]), strict=True):
        np.testing.assert_array_equal(values, expected)
    assert np.abs(np.concatenate(engine.log_probabilities(steps[0])) - np.concatenate(off)).max() > 1e-2


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Lora(use_dora=True), "--lora-use-dora is not supported on gate"),
        (Lora(target_modules=("experts.3.up_proj",)), "1 of 8 experts of layer 0 would get adapters of up_proj"),
        (
            Lora(rank_pattern=(("experts.3.up_proj", 2),)),
            "experts of layer 0 .* up_proj of rank 2, alpha 32 and rank 16, alpha 32",
        ),
        (Lora(target_modules=("up_proj", "linear_fc1")), "up_proj, linear_fc1"),
        (Lora(target_modules=("down_proj",), target_parameters=("down_proj",)), "down_proj"),
    ],
)
def test_what_experts_cannot_have_is_refused(lora: Lora, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tensor_table(dataclasses.replace(moe_config(), lora=lora))


def test_dropout_of_experts_is_refused(framework: str) -> None:
    config = dataclasses.replace(CONFIG, lora=Lora(lora_dropout=0.1))
    with pytest.raises(UserError, match=r"--lora-dropout 0\.1 is not supported on gate"):
        create_engine(framework, config, EngineSettings())
    create_engine(framework, config, EngineSettings(training=False))
    check_dropout(dataclasses.replace(CONFIG, lora=Lora(lora_dropout=0.1, target_modules=("q_proj",))))
