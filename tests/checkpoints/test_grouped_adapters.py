"""MindSpeed-LLM's adapters of grouped experts: computed here as its `LoraParallelGroupedMLP` computes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tandem.checkpoints.adapters.peft import write_peft
from tandem.checkpoints.adapters.views import merged
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_adapters, open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.parallel.layout import Layout
from toys import moe_config

torch = pytest.importorskip("torch")

CONFIG = moe_config({"num_layers": 2, "vocab_size": 212})
EXPERTS, HIDDEN, WIDTH = 8, 48, 24
RANK, ALPHA = 4, 8.0
# tensor ranks that cut each expert, and ranks that share the experts
LAYOUTS = {"one": (1, 1), "ep2": (1, 2), "tp2 ep2": (2, 2)}
PREFIX = "decoder.layers.{}.mlp.experts."


def write_run(folder: Path, tensor: int, expert: int, *, filtered: bool = False) -> Path:
    """A run's checkpoint, in which no factor equals another: also not those that all ranks of an expert have whole."""
    layout = Layout(tensor_model_parallel_size=tensor, expert_model_parallel_size=expert)
    copy(
        RandomSource(CONFIG, 5),
        MegatronSink(folder, CONFIG, layout, "float32", 3, Companions(), 212, moe_grouped_gemm=True),
    )
    held, random = EXPERTS // expert, np.random.default_rng(0)
    shapes = {
        "weight1_lora_a": (HIDDEN, RANK * held),
        "weight1_lora_b": (RANK, 2 * WIDTH * held // tensor),
        "weight2_lora_a": (WIDTH * held // tensor, RANK),
        "weight2_lora_b": (RANK * held, HIDDEN),
    }
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        model = {} if filtered else dict(content["model"])
        for layer in range(CONFIG.num_layers):
            for name, shape in shapes.items():
                factor = random.normal(scale=0.2, size=shape).astype(np.float32)
                model[PREFIX.format(layer) + name] = torch.from_numpy(factor)
        content["args"].lora_alpha = ALPHA
        torch.save({**content, "model": model}, path)
    return folder


def upstreams_output(folder: Path, tensor: int, expert: int, layer: int, number: int, tokens: np.ndarray) -> np.ndarray:
    """What an expert makes of tokens, [t, hidden], summed over the ranks that cut it, in fp64."""
    held, total = EXPERTS // expert, torch.zeros(tokens.shape, dtype=torch.float64)
    rank, local = divmod(number, held)
    for cut in range(tensor):
        name = f"mp_rank_{cut:02d}" + (f"_{rank:03d}" if expert > 1 else "")
        model = torch.load(folder / "iter_0000003" / name / "model_optim_rng.pt", weights_only=False)["model"]

        def of(tensor_name: str, *view: int, model: dict = model) -> torch.Tensor:
            return model[PREFIX.format(layer) + tensor_name].view(held, *view)[local].double()

        w1, w2 = of("weight1", HIDDEN, -1), of("weight2", -1, HIDDEN)
        w1_a, w1_b = of("weight1_lora_a", -1, RANK), of("weight1_lora_b", RANK, -1)
        w2_a, w2_b = of("weight2_lora_a", -1, RANK), of("weight2_lora_b", RANK, -1)
        x = torch.from_numpy(tokens).double()
        gate, up = (x @ w1 + x @ w1_a @ w1_b * (ALPHA / RANK)).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        total += inner @ w2 + inner @ w2_a @ w2_b * (ALPHA / RANK)
    return total.numpy()


def our_output(source: TensorSource, layer: int, number: int, tokens: np.ndarray) -> np.ndarray:
    """The same, from weights with the adapters merged into them."""
    fc1 = source.read(PREFIX.format(layer) + "linear_fc1.weight").reshape(EXPERTS, 2 * WIDTH, HIDDEN)[number]
    fc2 = source.read(PREFIX.format(layer) + "linear_fc2.weight").reshape(EXPERTS, HIDDEN, WIDTH)[number]
    gate, up = np.split(tokens @ fc1.T.astype(np.float64), 2, axis=1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up @ fc2.T.astype(np.float64))


@pytest.mark.parametrize("filtered", [False, True], ids=["whole", "filtered"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_weights_compute_what_upstream_computes(layout: str, filtered: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "whole", *LAYOUTS[layout])
    source = open_source(run)
    if filtered:
        only = write_run(tmp_path / "filtered", *LAYOUTS[layout], filtered=True)
        source = open_adapters(only, RandomSource(CONFIG, 5))
    assert source.config.lora is not None
    assert any("2 times the rank" in notice for notice in source.notices) == (layout == "tp2 ep2")
    assert (source.config.lora.r, source.config.lora.target_modules) == (RANK, ("linear_fc1", "linear_fc2"))
    tokens, whole = np.random.default_rng(1).normal(size=(5, HIDDEN)), merged(source)
    for layer in range(CONFIG.num_layers):
        for number in range(EXPERTS):
            expected = upstreams_output(run, *LAYOUTS[layout], layer, number, tokens)
            np.testing.assert_allclose(our_output(whole, layer, number, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["ep2", "tp2 ep2"])
def test_each_of_pefts_modules_gets_the_same_change(layout: str, tmp_path: Path) -> None:
    """W + alpha / r B A, with PEFT's names and patterns."""
    from safetensors.numpy import load_file

    source = open_source(write_run(tmp_path / "run", *LAYOUTS[layout]))
    write_peft(tmp_path / "peft", source, "base")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())

    def value_for(path: str, values: str, default: float) -> float:
        return next((v for key, v in config[values].items() if re.match(rf"(.*\.)?({key})$", path)), default)

    base, whole = RandomSource(CONFIG, 5), merged(source)
    for layer in range(CONFIG.num_layers):
        fc1, fc2 = (f"{PREFIX.format(layer)}linear_fc{number}.weight" for number in (1, 2))
        changes = {name: whole.read(name) - base.read(name) for name in (fc1, fc2)}
        halves = changes[fc1].reshape(EXPERTS, 2, WIDTH, HIDDEN)
        for number in range(EXPERTS):
            expected = {
                "gate_proj": halves[number, 0],
                "up_proj": halves[number, 1],
                "down_proj": changes[fc2].reshape(EXPERTS, HIDDEN, WIDTH)[number],
            }
            for module, change in expected.items():
                path = f"model.layers.{layer}.mlp.experts.{number}.{module}"
                a, b = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
                assert len(a) == value_for(path, "rank_pattern", config["r"])
                scale = value_for(path, "alpha_pattern", config["lora_alpha"]) / len(a)
                np.testing.assert_allclose(scale * b @ a, change, rtol=1e-4, atol=1e-5)


def test_peft_itself_computes_the_same(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    source = open_source(write_run(tmp_path / "run", *LAYOUTS["ep2"]))
    copy(RandomSource(CONFIG, 5), HFSink(tmp_path / "hf", CONFIG, "float32", Companions()))
    copy(merged(source), HFSink(tmp_path / "merged", CONFIG, "float32", Companions()))
    write_peft(tmp_path / "peft", source, str(tmp_path / "hf"))
    load, tokens = transformers.AutoModelForCausalLM.from_pretrained, torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = load(tmp_path / "merged", dtype=torch.float32)(tokens).logits
        model = peft.PeftModel.from_pretrained(load(tmp_path / "hf", dtype=torch.float32), tmp_path / "peft")
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-3, rtol=1e-3)


def test_a_factor_that_fits_no_expert_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, *LAYOUTS["one"])
    path = next(run.rglob("model_optim_rng.pt"))
    content = torch.load(path, weights_only=False)
    key = PREFIX.format(0) + "weight1_lora_b"
    content["model"][key] = content["model"][key][:, :-1].clone()
    torch.save(content, path)
    with pytest.raises(UserError, match=r"weight1_lora_b has shape \[4, 383\], which 8 experts cannot share"):
        open_source(run)
