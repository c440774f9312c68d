"""MindSpeed-LLM's checkpoints of adapters: made here by hand, as its code names and cuts them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from tandem.__main__ import main
from tandem.checkpoints.adapters.peft import PeftSource, open_weights, write_peft
from tandem.checkpoints.adapters.views import merged
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_adapters, open_source, open_with_adapters
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorSource
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.random_init import RandomSource
from tandem.config.settings import LoraSettings
from tandem.errors import UserError
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part
from tandem.training.start.lora import with_adapters
from toys import TOYS, moe_config

torch = pytest.importorskip("torch")

CONFIG = TOYS["qwen3-tied"]
RANK, ALPHA, TP = 4, 8.0, 2
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def whole_adapters() -> dict[str, np.ndarray]:
    """A and B of each layer's four weights, in one process."""
    random = np.random.default_rng(0)
    heads, groups, head = CONFIG.num_attention_heads, CONFIG.num_query_groups, CONFIG.kv_channels
    shapes = {
        "self_attention.linear_qkv": ((heads + 2 * groups) * head, CONFIG.hidden_size),
        "self_attention.linear_proj": (CONFIG.hidden_size, heads * head),
        "mlp.linear_fc1": (2 * CONFIG.ffn_hidden_size, CONFIG.hidden_size),
        "mlp.linear_fc2": (CONFIG.hidden_size, CONFIG.ffn_hidden_size),
    }
    tensors = {}
    for layer in range(CONFIG.num_layers):
        for name, (outputs, inputs) in shapes.items():
            prefix = f"decoder.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.default.weight"] = random.standard_normal((RANK, inputs), np.float32)
            tensors[f"{prefix}.lora_B.default.weight"] = random.standard_normal((outputs, RANK), np.float32)
    return tensors


def of_rank(name: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    """What a tensor rank of two holds: B of split outputs, A of split inputs, and the other factor whole."""
    if "linear_fc1.lora_B" in name:
        gate, up = np.split(tensor, 2)
        return np.concatenate([np.split(gate, TP)[rank], np.split(up, TP)[rank]])
    if "linear_qkv.lora_B" in name:
        return np.split(tensor, TP)[rank]
    if ("linear_proj.lora_A" in name) or ("linear_fc2.lora_A" in name):
        return np.split(tensor, TP, axis=1)[rank]
    return tensor


def write_run(folder: Path, *, filtered: bool, alpha: float | None = ALPHA) -> Path:
    """A run of two tensor ranks."""
    layout = Layout(tensor_model_parallel_size=TP)
    copy(RandomSource(CONFIG, 5), MegatronSink(folder, CONFIG, layout, "float32", 3, Companions(), 212))
    for rank in range(TP):
        path = folder / f"iter_0000003/mp_rank_{rank:02d}/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        model = {} if filtered else dict(content["model"])
        for name in LINEARS:
            for layer in range(CONFIG.num_layers * (not filtered)):
                key = f"decoder.layers.{layer}.{name}"
                model[f"{key}.base_layer.weight"] = model.pop(f"{key}.weight")
        for name, tensor in whole_adapters().items():
            model[name] = torch.from_numpy(of_rank(name, tensor, rank).copy())
        args = argparse.Namespace(**vars(content["args"]), lora_r=RANK, lora_target_modules=list(LINEARS))
        if alpha is not None:
            args.lora_alpha = alpha
        torch.save({**content, "model": model, "args": args}, path)
    return folder


def hugging_face(root: Path) -> Path:
    copy(RandomSource(CONFIG, 5), HFSink(root / "hf", CONFIG, "float32", Companions()))
    return root / "hf"


def check_merged(source: TensorSource) -> None:
    """Each weight is W + alpha / r B A."""
    base, adapters = RandomSource(CONFIG, 5), whole_adapters()
    for layer in range(CONFIG.num_layers):
        for name in LINEARS:
            key = f"decoder.layers.{layer}.{name}"
            change = adapters[f"{key}.lora_B.default.weight"] @ adapters[f"{key}.lora_A.default.weight"]
            expected = base.read(f"{key}.weight") + ALPHA / RANK * change
            np.testing.assert_allclose(merged(source).read(f"{key}.weight"), expected, atol=1e-5)


def test_a_run_that_holds_everything_is_merged(tmp_path: Path) -> None:
    check_merged(open_source(write_run(tmp_path / "run", filtered=False)))


def test_adapters_alone_are_put_next_to_their_weights(tmp_path: Path) -> None:
    run, base = write_run(tmp_path / "run", filtered=True), open_source(hugging_face(tmp_path))
    check_merged(open_adapters(run, base))
    with pytest.raises(UserError, match="--lora-load"):
        open_source(run)


def test_adapters_alone_are_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without their weights, which `inspect` does not take. One B is made zero."""
    run = write_run(tmp_path / "run", filtered=True)
    for path in run.glob("*/*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        content["model"][f"decoder.layers.1.{LINEARS[0]}.lora_B.default.weight"].zero_()
        torch.save(content, path)
    assert main(["inspect", "checkpoint", str(run)]) == 0
    out = capsys.readouterr().out
    rows = [line.strip("│ ").split() for line in out.splitlines()]
    layers = str(CONFIG.num_layers)
    assert ["linear_qkv", "│", layers, "│", "4", "│", "8", "│", "1", "layers"] in rows
    assert ["linear_fc2", "│", layers, "│", "4", "│", "8", "│", "none"] in rows
    assert ["weights", "│", "not", "here:", "adapters", "alone"] in rows
    numbers = sum(tensor.size for tensor in whole_adapters().values())
    assert f"{numbers:,}" in out
    assert "every number is finite" in out


def test_alpha_must_be_known(tmp_path: Path) -> None:
    run, base = write_run(tmp_path / "run", filtered=True, alpha=None), open_source(hugging_face(tmp_path))
    with pytest.raises(UserError, match="--lora-alpha"):
        open_adapters(run, base)
    check_merged(open_with_adapters(tmp_path / "hf", None, str(run), lora_alpha=ALPHA))
    check_merged(with_adapters(base, LoraSettings(lora_load=str(run), lora_alpha=ALPHA), 1, resumes=False))
    recorded = write_run(tmp_path / "other", filtered=True)
    with pytest.raises(UserError, match="contradicts"):
        open_adapters(recorded, base, lora_alpha=ALPHA + 1)


@pytest.mark.parametrize("base", ["hf", "mg", "random"])
def test_convert_merges_them_and_writes_them_alone(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two commands of docs/guide/migrate.md, for weights of each kind."""
    weights, run = hugging_face(tmp_path), write_run(tmp_path / "run", filtered=True)
    if base == "mg":
        assert main(["convert", str(weights), str(tmp_path / "mg"), "--no-verify"]) == 0
        weights = tmp_path / "mg"
    words = ["convert", "--load-model-type", base, "--save-model-type", "hf", "--load-dir", str(weights)]
    words += ["--lora-load", str(run), "--lora-r", str(RANK), "--lora-alpha", str(ALPHA), "--no-verify", "--seed", "5"]
    assert main([*words, "--save-dir", str(tmp_path / "merged")]) == 0
    assert "merged into the weights: LoRA adapters of rank 4, alpha 8" in capsys.readouterr().out
    check_merged(open_source(tmp_path / "merged"))
    assert main([*words, "--save-dir", str(tmp_path / "peft"), "--save-lora-to-hf"]) == 0
    written, adapters = PeftSource(tmp_path / "peft", CONFIG), whole_adapters()
    assert (written.config.lora.r, written.config.lora.lora_alpha) == (RANK, ALPHA)
    for layer in range(CONFIG.num_layers):
        name = f"decoder.layers.{layer}.self_attention.linear_proj"
        stored = f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_B.weight"
        np.testing.assert_array_equal(
            open_weights(tmp_path / "peft").read(stored), adapters[f"{name}.lora_B.default.weight"]
        )
    assert main([*words, "--save-dir", str(tmp_path / "no"), "--lora-r", "8"]) == 2
    assert f"--lora-r 8 contradicts {run}, whose adapters have r {RANK}" in capsys.readouterr().err


def test_a_run_that_holds_everything_is_converted_with_its_alpha(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", filtered=False, alpha=None)
    words = ["convert", "--load-model-type", "mg", "--load-dir", str(run), "--save-model-type", "hf", "--no-verify"]
    assert main([*words, "--save-dir", str(tmp_path / "no")]) == 2
    assert main([*words, "--save-dir", str(tmp_path / "merged"), "--lora-alpha", str(ALPHA)]) == 0
    check_merged(open_source(tmp_path / "merged"))


def test_peft_computes_the_same_from_the_folder_that_is_written(tmp_path: Path) -> None:
    """q, k and v get copies of A, and their rows of B."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder = hugging_face(tmp_path)
    source = open_adapters(write_run(tmp_path / "run", filtered=True), open_source(folder))
    write_peft(tmp_path / "peft", source, str(folder))
    copy(merged(source), HFSink(tmp_path / "merged", CONFIG, "float32", Companions()))
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = load(tmp_path / "merged", dtype=torch.float32)(tokens).logits
        model = peft.PeftModel.from_pretrained(load(folder, dtype=torch.float32), tmp_path / "peft")
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-3, rtol=1e-4)


def test_adapters_of_experts_are_read_and_merged(tmp_path: Path) -> None:
    """Two ranks share the experts of a layer, each a linear layer of its own: what is not grouped."""
    config = moe_config({"num_layers": 1})
    experts, layout = config.experts, Layout(expert_model_parallel_size=2)
    assert experts is not None
    copy(RandomSource(config, 5), MegatronSink(tmp_path, config, layout, "float32", 3, Companions(), 212))
    random, prefix = np.random.default_rng(0), "decoder.layers.0.mlp.experts."
    width, hidden = experts.moe_ffn_hidden_size, config.hidden_size
    shapes = {"linear_fc1": (2 * width, hidden), "linear_fc2": (hidden, width)}
    factors = {
        name: (random.normal(size=(8, rows, RANK)), random.normal(size=(8, RANK, columns)))
        for name, (rows, columns) in shapes.items()
    }
    for rank in range(2):
        path = tmp_path / f"iter_0000003/mp_rank_00_{rank:03d}/model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        model = content["model"]
        for name, (b, a) in factors.items():
            for local in range(4):
                key = f"{prefix}local_experts.{local}.{name}"
                model[f"{key}.base_layer.weight"] = model.pop(f"{key}.weight")
                model[f"{key}.lora_A.default.weight"] = torch.from_numpy(a[rank * 4 + local].astype(np.float32))
                model[f"{key}.lora_B.default.weight"] = torch.from_numpy(b[rank * 4 + local].astype(np.float32))
        content["args"].lora_alpha = ALPHA
        torch.save(content, path)
    source, base = merged(open_source(tmp_path)), RandomSource(config, 5)
    for name, (b, a) in factors.items():
        expected = base.read(f"{prefix}{name}.weight") + ALPHA / RANK * (b @ a).reshape(-1, shapes[name][1])
        np.testing.assert_allclose(source.read(f"{prefix}{name}.weight"), expected, atol=1e-5)
        half = Part((((4 * shapes[name][0], 8 * shapes[name][0]), (0, shapes[name][1])),))
        streamed = np.concatenate(list(source.stream(f"{prefix}{name}.weight", half)))
        np.testing.assert_array_equal(streamed, np.split(source.read(f"{prefix}{name}.weight"), 2)[1])
