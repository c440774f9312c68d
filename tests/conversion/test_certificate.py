"""An export that asks, stops or computes otherwise than training is caught, and the cause is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from answering_stub import Served, serving
from safetensors.torch import load_file, save_file

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.companions import companion_files
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion.certificate import compare, write
from tandem.conversion.certificate.content import read_certificate
from tandem.models.hf_config import to_hf
from tandem.training.run import train
from workspace import Workspace


@pytest.fixture(scope="module")
def places(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`: a model whose norms are not one. `out`: the export of adapters that were trained on it."""
    root = tmp_path_factory.mktemp("certificate")
    config = dataclasses.replace(open_source(workspace.hf).config, rotary_base=1e6, num_layers=2)
    source = RandomSource(config, 3)
    read = source.stream

    def shaken(name: str, *arguments: Any) -> Any:
        for rows in read(name, *arguments):
            yield rows * np.linspace(0.5, 1.5, len(rows), dtype=np.float32) if rows.ndim == 1 else rows

    source.stream = shaken  # type: ignore[method-assign]
    files = companion_files(workspace.hf)
    copy(source, HFSink(root / "base", config, "float32", Companions(to_hf(config, dtype="float32"), files)))
    train(
        workspace.settings(
            "torch",
            instructions=True,
            load=str(root / "base"),
            save=str(root / "run"),
            train_iters=8,
            lr=2e-2,
            lora_target_modules=["all-linear"],
        )
    )
    assert main(["export", str(root / "run"), str(root / "out")]) == 0
    return root


def changed_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def changed_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: t.contiguous() for name, t in changed.items() if t is not None}, path, {"format": "pt"})


def drop_q_norm(folder: Path) -> None:
    changed_weights(folder, lambda name, tensor: None if "q_norm" in name else tensor)


def drop_down_proj(folder: Path) -> None:
    changed_weights(folder, lambda name, tensor: None if name.endswith("1.mlp.down_proj.weight") else tensor)


def forget_norms(folder: Path) -> None:
    changed_json(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])


def other_template(folder: Path) -> None:
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert "<think>" in template
    changed_json(folder / "tokenizer_config.json", chat_template=template.replace("<think>\\n\\n</think>\\n\\n", ""))


def other_letters(folder: Path) -> None:
    """A template whose prompts have as many tokens."""
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    changed_json(folder / "tokenizer_config.json", chat_template=template.replace("<|im_end|>\\n", "<|im_end|> "))


def forget_adapters(folder: Path) -> None:
    shutil.copyfile(folder.parent / "base" / "model.safetensors", folder / "model.safetensors")


def merge_in_bf16(folder: Path) -> None:
    changed_weights(folder, lambda name, tensor: tensor.bfloat16())
    changed_json(folder / "config.json", dtype="bfloat16", torch_dtype="bfloat16")


def merge_in_bf16_and_widen(folder: Path) -> None:
    changed_weights(folder, lambda name, tensor: tensor.bfloat16().float())


def other_end(folder: Path) -> None:
    changed_json(folder / "generation_config.json", eos_token_id=5)


def forget_rope(folder: Path) -> None:
    changed_json(folder / "config.json", rope_theta=..., rope_scaling=..., rope_parameters=...)


def other_weights(folder: Path) -> None:
    changed_weights(folder, lambda name, tensor: tensor * 1.5 if "o_proj" in name else tensor)


DAMAGES: dict[Callable[[Path], None], tuple[str, str]] = {
    drop_q_norm: (compare.NORM, "the files lack model.layers.0.self_attn.q_norm.weight and 1 more"),
    forget_norms: (compare.NORM, "the model does not use model.layers.0.self_attn.k_norm.weight and 3 more"),
    drop_down_proj: (compare.MISSING, "the files lack model.layers.1.mlp.down_proj.weight"),
    other_template: (compare.TEMPLATE, "3 of 3 conversations are not asked as in training"),
    other_letters: (compare.TEMPLATE, "3 of 3 conversations are not asked as in training"),
    forget_adapters: (compare.ADAPTER, "those of the base without its adapters"),
    merge_in_bf16: (compare.ROUNDING, "those of weights rounded to bfloat16"),
    merge_in_bf16_and_widen: (compare.ROUNDING, "those of weights rounded to bfloat16"),
    other_end: (compare.END_TOKEN, "answers end at <|im_end|>"),
    forget_rope: (compare.ROPE, "rotary_base is 10000.0, 1000000.0 in training"),
    other_weights: (compare.WEIGHTS, "more than rounding explains"),
}
# A server tells less: what a damage does is recognised by its numbers.
AT_A_SERVER = {
    drop_q_norm: (compare.NORM, "those with q_norm of one"),
    forget_norms: (compare.NORM, "those of the model without q_norm and k_norm"),
    other_template: (compare.TEMPLATE, "has 43 tokens, 49 in training"),
    other_letters: (compare.TEMPLATE, "as many tokens as in training, but its likeliest next token"),
    forget_adapters: DAMAGES[forget_adapters],
    merge_in_bf16_and_widen: DAMAGES[merge_in_bf16_and_widen],
    other_end: (compare.END_TOKEN, "the server goes on; training ends it at <|im_end|>"),
    forget_rope: (compare.ROPE, "those of rope_theta 10000"),
    other_weights: DAMAGES[other_weights],
}


def damaged(places: Path, damage: Callable[[Path], None]) -> Path:
    folder = places / damage.__name__
    if not folder.exists():
        shutil.copytree(places / "out", folder)
        damage(folder)
    return folder


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["verify", *words])
    return code, capsys.readouterr().out


def test_an_export_computes_what_training_computes(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = verify(capsys, str(places / "out"))
    assert code == 0, printed
    assert "asks, stops and computes as training does" in printed
    certificate = read_certificate(places / "out")
    assert certificate.prompt == {"prompt_type": "qwen3", "enable_thinking": None}
    assert {*certificate.alternatives} == {
        *write.NEW_NORMS,
        *(write.NO_ADAPTERS, write.NO_NORMS, write.DEFAULT_THETA, write.ROUNDED),
    }
    assert all(len(values) for values in certificate.training.log_probabilities)
    assert verify(capsys, str(places / "out" / "certificate.json"))[0] == 0


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_caught_and_the_cause_named(
    places: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cause, words = DAMAGES[damage]
    code, printed = verify(capsys, str(damaged(places, damage)))
    assert code == 1, printed
    named = [line for line in printed.splitlines() if line.startswith("DIFFERENT: ")]
    assert named[0].startswith(f"DIFFERENT: {cause}: ")
    assert words in named[0]
    assert len(named) == 1 + (damage is forget_norms)  # which also changes the model_type


@pytest.mark.parametrize(("logprobs", "tokenize"), [("echo", False), ("prompt_logprobs", True)])
def test_a_damaged_server_is_caught_and_the_cause_named(
    places: Path, logprobs: str, tokenize: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks the chat endpoint for the number of tokens, and vLLM's `/tokenize` for the tokens, where there is one."""
    models = {damage.__name__: Served(damaged(places, damage)) for damage in AT_A_SERVER}
    models["out"] = Served(places / "out")
    with serving(models, logprobs=logprobs, tokenize=tokenize) as url:
        code, printed = verify(capsys, "--url", url, "--model", "out")
        assert code == 0, printed
        assert "not compared" not in printed
        for damage, (cause, words) in AT_A_SERVER.items():
            code, printed = verify(capsys, str(places / "out"), "--url", f"{url}/v1", "--model", damage.__name__)
            assert code == 1, printed
            named = [line for line in printed.splitlines() if line.startswith("DIFFERENT: ")]
            assert [line.split(": ")[1] for line in named] == [cause], printed
            assert tokenize or words in named[0]


def test_what_a_server_cannot_tell_is_said(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in bfloat16 rounds, which a tolerance accepts. One without log-probabilities is compared less."""
    models = {"out": Served(places / "out", torch.bfloat16)}
    with serving(models) as url:
        code, printed = verify(capsys, "--url", url)
        assert code == 1
        assert printed.count("DIFFERENT: ") == 1
        assert "DIFFERENT: rounding: " in printed
        assert verify(capsys, "--url", url, "--tolerance", "0.2")[0] == 0
    with serving(models, logprobs="none") as url:
        code, printed = verify(capsys, "--url", url)
        assert code == 0
        assert "> not compared: log-probabilities: the server gives none for prompts" in printed


@pytest.mark.parametrize(("answer", "told"), [(None, "no answer"), (b"{}", "nothing could be compared")])
def test_a_server_that_answers_nothing_is_not_right(
    places: Path, answer: bytes | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lists its model, and then closes the connection, or gives no answer that can be read."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(b'{"data": [{"id": "out"}]}')

        def do_POST(self) -> None:
            if answer is not None:
                self.say(answer)

        def say(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert main(["verify", str(places / "out"), "--url", f"http://127.0.0.1:{server.server_port}"]) == 2
        server.shutdown()
    assert told in capsys.readouterr().err


def test_a_model_without_end_tokens_is_not_said_to_stop(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base has one in the tokenizer's files alone, where transformers' `generate` does not look."""
    assert main(["export", str(places / "base"), str(places / "endless"), "--no-verify"]) == 0
    assert "states an end token: transformers ends no answer by itself" in capsys.readouterr().out
    code, printed = verify(capsys, str(places / "endless"))
    assert code == 0
    assert "> not compared: the end token: neither generation_config.json nor config.json" in printed
    assert "stops" not in printed


def test_rounding_at_export_is_said_and_can_be_avoided(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merge into bfloat16 weights rounds. In fp32 it does not, although the base is bfloat16."""
    base, out = str(places / "base16"), places / "merged16"
    assert (
        main(["convert", str(places / "base"), "--load-model-type", "hf", "--save-model-type", "mg", base + "m"]) == 0
    )
    words = ["--load-model-type", "mg", "--save-model-type", "hf", "--params-dtype", "bf16"]
    assert main(["convert", base + "m", base, *words]) == 0
    assert main(["export", str(places / "run"), str(places / "peft"), "--save-lora-to-hf"]) == 0
    capsys.readouterr()
    adapters = ["--lora-load", str(places / "peft")]
    assert main(["export", base, str(out), *adapters]) == 0
    assert "> rounding to bfloat16 moves log-probabilities by up to 0." in capsys.readouterr().out
    code, printed = verify(capsys, str(out))
    assert code == 0, printed
    assert "these are the numbers of the export, which rounded to bfloat16" in printed
    assert main(["export", base, str(out) + "-32", *adapters, "--params-dtype", "fp32"]) == 0
    assert "rounding" not in capsys.readouterr().out
    code, printed = verify(capsys, f"{out}-32")
    assert code == 0
    assert "which rounded" not in printed


def test_no_room_and_no_wish_are_said(
    places: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(workspace.hf), str(places / "without"), "--no-certificate"]) == 0
    assert not (places / "without" / "certificate.json").exists()
    assert main(["verify", str(places / "without")]) == 2
    assert "Export again without --no-certificate" in capsys.readouterr().err
    base = places / "no-config"
    shutil.copytree(workspace.hf, base)
    (base / "tokenizer_config.json").unlink()
    assert main(["export", str(base), str(places / "no-tokenizer")]) == 0
    assert "> no certificate.json: " in capsys.readouterr().out
    monkeypatch.setattr(write, "available_bytes", lambda: 1 << 20)
    assert main(["export", str(workspace.hf), str(places / "small")]) == 0
    assert not (places / "small" / "certificate.json").exists()
    assert (
        "> no certificate.json: computing it takes about 1.1 GB of memory, and 0.0 GB are free"
        in capsys.readouterr().out
    )


def test_bad_input_is_named(places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert main(["verify", *words]) == 2
        return capsys.readouterr().err

    assert "FOLDER (--folder) is required" in error()
    assert "--model belongs to --url" in error(str(places / "out"), "--model", "m")
    assert "--tolerance 0.0: expected more than 0" in error(str(places / "out"), "--tolerance", "0")
    assert "expected an address such as http://127.0.0.1:8000" in error("--url", "localhost")
    assert "no answer" in error("--url", "http://127.0.0.1:9")
    (tmp_path / "certificate.json").write_text('{"form": 1}')
    assert "certificate.json: damaged" in error(str(tmp_path))
    (tmp_path / "certificate.json").write_text('{"form": 7}')
    assert "form 7, expected 1" in error(str(tmp_path))
    with serving({"a": Served(places / "out"), "b": Served(places / "base")}) as url:
        assert "serves 2 models: choose one with --model: a, b" in error("--url", url)
        assert "--model c: " in error("--url", url, "--model", "c")
        assert "does not tell a folder" in error("--url", url, "--model", "b")
        assert "refuses the key" in error("--url", url, "--model", "a", "--api-key", "wrong")
