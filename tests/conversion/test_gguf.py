"""A GGUF file holds the model: transformers' own loader computes from it what it computes from the folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.gguf.read_back import read_back
from tandem.checkpoints.gguf.tensors import check_supported
from tandem.checkpoints.hf.companions import companion_files
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.gguf import set_rotary_scaling, set_scaling
from tandem.conversion.gguf_vocabulary import SPLITS, vocabulary_of
from tandem.errors import UserError
from tandem.models.config import ModelConfig, RotaryScaling
from tandem.models.hf_config import to_hf
from toys import TOYS, toy_config
from workspace import Workspace

WIDE = {"vocab_size": 448, "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2}
LLAMA3 = RotaryScaling(kind="llama3", factor=8.0, original_max_position_embeddings=128)
CASES = {
    "qwen3": (toy_config(**WIDE), "q8_0"),
    # rows of 48 numbers are no whole number of Q8_0's blocks
    "qwen3-narrow": (toy_config(vocab_size=448, num_layers=1, untie_embeddings_and_output_weights=True), "q8_0"),
    "qwen2": (toy_config(**WIDE, model_type="qwen2", num_attention_heads=4, rotary_base=5e5), "bf16"),
    "llama": (
        toy_config(
            **WIDE,
            model_type="llama",
            num_attention_heads=4,
            norm_epsilon=1e-5,
            untie_embeddings_and_output_weights=True,
        ),
        "f16",
    ),
}
TYPES = {"q8_0": "Q8_0", "f16": "F16", "bf16": "BF16"}


def folder_of(workspace: Workspace, config: ModelConfig, folder: Path) -> Path:
    """A Hugging Face folder of random weights, whose norms and biases are random, too."""
    source = RandomSource(config, 5)
    read = source.stream

    def shaken(name: str, *arguments: object) -> object:
        random = np.random.default_rng(len(name))
        for rows in read(name, *arguments):  # type: ignore[arg-type]
            yield rows + random.normal(0, 0.1, rows.shape).astype(np.float32) if rows.ndim == 1 else rows

    source.stream = shaken  # type: ignore[method-assign, assignment]
    copy(source, HFSink(folder, config, "float32", Companions(to_hf(config), companion_files(workspace.hf))))
    return folder


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_from_the_file_what_it_computes_from_the_folder(
    workspace: Workspace, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the folder's weights, rounded by `gguf`'s own code."""
    config, encoding = CASES[case]
    hf = folder_of(workspace, config, tmp_path / "hf")
    assert main(["export", str(hf), str(tmp_path / "tuned"), "--gguf", encoding]) == 0
    printed = capsys.readouterr().out
    path = only_file(tmp_path / "tuned")
    assert path.name == f"tuned-{TYPES[encoding]}.gguf"
    assert f"serve it: llama-server -m {path}" in printed

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_layers)
    for name, weight in model.named_parameters():
        kind = types[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        fits = weight.shape[-1] % 32 == 0 or encoding != "q8_0"
        assert kind.name == ("F32" if weight.ndim == 1 else TYPES[encoding] if fits else "F16")
        rounded = gguf.dequantize(gguf.quantize(weight.detach().numpy(), kind), kind)
        weight.data = torch.from_numpy(np.array(rounded))
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=AutoConfig.from_pretrained(hf), dtype=torch.float32
    )
    tokens = torch.arange(3, 53)[None]
    with torch.no_grad():
        assert (model(tokens).logits - read(tokens).logits).abs().max() < 1e-4

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(hf)
    message = [{"role": "user", "content": "Which digit of 90 is largest?"}]
    assert theirs.apply_chat_template(message, tokenize=False) == ours.apply_chat_template(message, tokenize=False)
    text = ours.apply_chat_template(message, tokenize=False)
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.eos_token == "<|im_end|>"


def value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def test_the_file_says_what_llama_cpp_reads(workspace: Workspace, tmp_path: Path) -> None:
    """Rotary fields, end tokens and types of tokens."""
    config = toy_config(**WIDE, model_type="llama", num_attention_heads=4, rotary_base=5e5, rotary_scaling=LLAMA3)
    hf = folder_of(workspace, config, tmp_path / "hf")
    (hf / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [token_id(hf, "<|im_end|>"), token_id(hf, "<think>")]})
    )
    assert main(["export", str(hf), str(tmp_path / "out"), "--gguf", "f16"]) == 0
    reader = gguf.GGUFReader(only_file(tmp_path / "out"))
    assert value(reader, "general.architecture") == "llama"
    assert value(reader, "general.file_type") == int(gguf.LlamaFileType.MOSTLY_F16)
    assert value(reader, "llama.rope.freq_base") == 5e5
    assert value(reader, "llama.rope.dimension_count") == value(reader, "llama.attention.key_length") == 16
    assert value(reader, "tokenizer.ggml.eos_token_id") == token_id(hf, "<|im_end|>")
    assert value(reader, "tokenizer.ggml.eot_token_id") == token_id(hf, "<think>")
    types = value(reader, "tokenizer.ggml.token_type")
    texts = value(reader, "tokenizer.ggml.tokens")
    assert isinstance(types, list)
    assert isinstance(texts, list)
    by_text = dict(zip(texts, types, strict=True))
    assert len(types) == config.vocab_size
    assert by_text["<|im_end|>"] == gguf.TokenType.CONTROL
    assert by_text["<think>"] == gguf.TokenType.USER_DEFINED
    assert by_text[f"[PAD{config.vocab_size - 1}]"] == gguf.TokenType.UNUSED

    # llama.cpp divides the frequencies by these; transformers scales them
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    rotary = AutoModelForCausalLM.from_pretrained(hf).model.rotary_emb.inv_freq.numpy()
    plain = 1 / 5e5 ** (np.arange(0, 16, 2) / 16)
    assert np.allclose(plain / factors, rotary, rtol=1e-6)
    assert factors.max() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("scaling", "fields"),
    [
        (RotaryScaling(kind="linear", factor=4.0), {"type": "linear", "factor": 4.0}),
        (
            RotaryScaling(kind="yarn", factor=4.0, original_max_position_embeddings=128),
            {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 32.0},
        ),
    ],
)
def test_scaled_frequencies_are_fields(scaling: RotaryScaling, fields: dict[str, object], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3")
    set_scaling(writer, scaling)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {name: value(reader, f"qwen3.rope.scaling.{name}") for name in fields} == fields


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    for scaling in ({"attention_factor": 1.5}, {"truncate": False}):
        config = toy_config(rotary_scaling=RotaryScaling(kind="yarn", factor=4.0, **scaling))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"llama\.cpp computes YaRN"):
            check_supported(config)
    with pytest.raises(UserError, match="model_type qwen3_moe is not supported; supported: qwen3, qwen2, llama"):
        check_supported(TOYS["qwen3-moe"])


def token_id(folder: Path, token: str) -> int:
    return next(
        int(entry["id"])
        for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        if entry["content"] == token
    )


def test_a_file_with_other_numbers_is_found(workspace: Workspace, tmp_path: Path) -> None:
    """In one head of one key projection, whose rows llama.cpp orders in another way."""
    hf = folder_of(workspace, CASES["llama"][0], tmp_path / "hf")
    assert main(["export", str(hf), str(tmp_path / "out"), "--gguf", "f16"]) == 0
    path, source = only_file(tmp_path / "out"), open_source(hf)
    read_back(path, source, "f16")
    writable = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in writable.tensors if tensor.name == "blk.1.attn_k.weight")
    tensor.data[[1, 2]] = tensor.data[[2, 1]]
    writable.data.flush()
    with pytest.raises(UserError, match=r"blk\.1\.attn_k\.weight does not hold the numbers"):
        read_back(path, source, "f16")


@pytest.mark.parametrize("name", SPLITS)
def test_the_split_of_a_tokenizer_gets_its_name(tmp_path: Path, name: str) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = SPLITS[name]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = vocabulary_of(tmp_path / "tokenizer.json", "qwen3", 4)
    assert (vocabulary.pre, vocabulary.notice) == (name, "")


def test_qwens_split_is_the_one_in_transformers(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert vocabulary_of(tmp_path / "tokenizer.json", "llama", 4).pre == "qwen2"


def test_a_split_without_a_name_is_said(workspace: Workspace) -> None:
    """The toy's: it knows no contractions."""
    vocabulary = vocabulary_of(workspace.hf / "tokenizer.json", "llama", 448)
    assert vocabulary.pre == "llama-bpe"
    assert "llama.cpp has no name for the way in which this tokenizer splits texts" in vocabulary.notice


def test_bad_input_is_refused_by_name(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")

    def error(*words: str) -> str:
        assert main(["export", *words]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "--gguf q4: expected f16 or bf16 or q8_0" in error(str(workspace.hf), out, "--gguf", "q4")
    assert "TARGET (--save-dir) x.gguf: is the folder of the file" in error(
        str(workspace.hf), "x.gguf", "--gguf", "f16"
    )
    both = error(str(workspace.hf), out, "--gguf", "f16", "--params-dtype", "fp32")
    assert "--gguf f16 and --params-dtype exclude each other" in both

    other = tmp_path / "unigram"
    other.mkdir()
    for path in workspace.hf.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["byte_fallback"] = True
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "no byte-level BPE tokenizer" in error(str(other), out, "--gguf", "f16")

    (other / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in error(str(other), out, "--gguf", "f16")

    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'tandem-llm[gguf]'" in error(str(workspace.hf), out, "--gguf", "f16")


def test_yarn_is_told_where_llama_cpp_computes_it(workspace: Workspace, tmp_path: Path) -> None:
    yarn = RotaryScaling("yarn", 4.0, original_max_position_embeddings=128)
    hf = folder_of(workspace, toy_config(**WIDE, num_attention_heads=4, rotary_scaling=yarn), tmp_path / "hf")
    assert main(["export", str(hf), str(tmp_path / "out"), "--gguf", "f16"]) == 0
    reader = gguf.GGUFReader(only_file(tmp_path / "out"))
    assert value(reader, "qwen3.rope.scaling.type") == "yarn"
    assert value(reader, "qwen3.rope.scaling.factor") == 4.0
    assert value(reader, "qwen3.rope.scaling.original_context_length") == 128
    with pytest.raises(UserError, match="attention_factor"):
        set_rotary_scaling(gguf.GGUFWriter(None, "qwen3"), dataclasses.replace(yarn, attention_factor=1.2))
