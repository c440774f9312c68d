"""`tandem convert`: upstream's command lines run as they are, logits are compared, mistakes end with exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tandem.__main__ import main
from tandem.checkpoints.copy import copy
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.interface import Companions, TensorKind, TensorSource
from tandem.checkpoints.random_init import RandomSource
from tandem.conversion import run as command
from tandem.conversion.verify import Verification, verify
from tandem.errors import UserError
from toys import toy_config

# Every flag that the Qwen3 scripts and the argument parsers of MindSpeed-LLM's converters know, with what a Qwen3
# dense model gives it.
UPSTREAM = """
    --use-mcore-models --model-type GPT --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec --loader hf
    --saver mg --max-queue-size 50 --tokenizer-model tokenizer.json --params-dtype bf16 --model-type-hf qwen3
    --make-vocab-size-divisible-by 1 --ai-framework mindspore --target-expert-parallel-size 1 --no-checking
    --expert-tensor-parallel-size 1 --save-layer-by-layer --load-checkpoint-loosely --transformer-impl local
    --mtp-num-layers 0 --first-k-dense-replace 0 --w-pack False --true-vocab-size 211 --load-hf-from-config
    --vocab-file v --megatron-path m --ckpt-cfg-path c --ckpt-format torch --qk-layernorm --no-verify
"""


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    config = toy_config(num_layers=4)
    copy(RandomSource(config, 3, "bfloat16"), HFSink(tmp_path / "hf", config, "bfloat16", Companions()))
    return tmp_path / "hf"


def words(hf: Path, *more: str) -> list[str]:
    return ["convert", "--load-dir", str(hf), "--save-dir", str(hf.parent / "m"), *more]


def test_upstreams_flags_are_accepted_and_said_once(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size=2"]
    assert main(words(hf, "--load_model_type", "hf", "--save-model-type", "mg", *layout, *UPSTREAM.split())) == 0
    output = capsys.readouterr().out
    assert output.count("accepted, without effect") == 1
    for flag in ("--use-mcore-models", "--loader", "--no-checking", "--megatron-path", "--mtp-num-layers"):
        assert output.count(flag) == 1
    assert "successfully saved checkpoint from iteration       1" in output


def test_flags_without_effect_for_the_target_are_said(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(hf, "--padded-vocab-size", "300", "--no-verify")) == 0
    assert "accepted, without effect for this target: --padded-vocab-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedules-method", "dualpipev"], "--schedules-method: dualpipev is not supported"),
        (["--target-tensor-parallel-size", "7"], "--target-tensor-parallel-size 7: the model's .*: give 1 or 2"),
        (["--target-expert-parallel-size", "2"], "--target-expert-parallel-size 2: the model has no experts"),
        (["--w-pack", "True"], "--w-pack True: only False"),
        (["--verify", "--no-verify"], "exclude each other"),
        (["--num-query-groups", "4"], "--num-query-groups 4 contradicts the config of .*"),
    ],
)
def test_flags_that_cannot_be_met_stop(
    flags: list[str], message: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(hf, *flags)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (hf.parent / "m").exists()


def test_an_unknown_flag_is_an_error_with_the_nearest_name(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(hf, "--target-tensor-paralel-size", "2")) == 2
    assert "--target-tensor-parallel-size" in capsys.readouterr().err


# --- logits


@pytest.mark.parametrize("ckpt_format", ["native", "torch"])
def test_small_models_are_verified_unasked(
    framework: str, ckpt_format: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both directions by transformers, which shares no reader with us; between checkpoints by one framework."""
    chosen = ["--ai-framework", framework]
    flags = [*chosen, "--ckpt-format", ckpt_format, "--target-pipeline-parallel-size", "2"]
    assert main(words(hf, *flags)) == 0
    assert f"verified with transformers (source) and {framework} (result): logits on 64" in capsys.readouterr().out
    checkpoint = str(hf.parent / "m")
    assert main(["export", "--load", checkpoint, "--save-dir", str(hf.parent / "back"), *chosen]) == 0
    assert f"verified with {framework} (source) and transformers (result): logits" in capsys.readouterr().out
    again = ["--load-dir", checkpoint, "--save-dir", str(hf.parent / "n"), "--load-model-type", "mg"]
    assert main(["convert", *again, *chosen]) == 0
    expected = f"verified with {framework} (both sides are read by Tandem): logits on 64 tokens: largest difference 0.0"
    assert expected in capsys.readouterr().out


def test_without_transformers_one_framework_reads_both(
    framework: str, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the line says so."""
    monkeypatch.setattr("tandem.conversion.verify.has_transformers", lambda: False)
    assert main(words(hf, "--ai-framework", framework)) == 0
    assert f"verified with {framework} (both sides are read by Tandem)" in capsys.readouterr().out


@pytest.mark.parametrize("params_dtype", [None, "fp16"])
def test_weights_are_compared_in_their_own_dtype(params_dtype: str | None, hf: Path, tmp_path: Path) -> None:
    """Fp32 weights under a config that says bfloat16, as many hub folders have them."""
    config = toy_config(num_layers=4)
    copy(RandomSource(config, 3, "float32"), HFSink(tmp_path / "f", config, "float32", Companions()))
    (tmp_path / "f/config.json").write_text((hf / "config.json").read_text())
    assert '"bfloat16"' in (tmp_path / "f/config.json").read_text()
    chosen = ["--params-dtype", params_dtype] if params_dtype else []
    words = ["--load-dir", str(tmp_path / "f"), "--save-dir", str(tmp_path / "g"), "--verify", *chosen]
    assert main(["convert", *words]) == 0


class Off(RandomSource):
    """One number of one tensor is another."""

    def read(self, name: str, kind: TensorKind = "model") -> np.ndarray:
        tensor = super().read(name, kind)
        if name == "decoder.layers.2.mlp.linear_fc1.weight":
            tensor[3, 4] += 5
        return tensor


def test_the_first_differing_tensor_is_named(framework: str) -> None:
    config = toy_config()
    with pytest.raises(UserError, match=r"top-1.*first differing tensor is decoder\.layers\.2\.mlp\.linear_fc1"):
        verify(RandomSource(config, 3), Off(config, 3), framework)
    other = toy_config(rotary_base=1e4)
    with pytest.raises(UserError, match=r"is not the model of .*rotary_base: 1000000\.0, then 10000\.0"):
        verify(RandomSource(config, 3), RandomSource(other, 3), framework)


def test_no_verify_forbids_the_comparison(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(hf, "--no-verify")) == 0
    assert main(["export", "--load", str(hf.parent / "m"), "--save-dir", str(hf.parent / "b"), "--no-verify"]) == 0
    assert "verified" not in capsys.readouterr().out
    both = ["--no-verify", "--verify"]
    assert main(["export", "--load", str(hf.parent / "m"), "--save-dir", str(hf.parent / "c"), *both]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_the_independent_reader_sees_what_ours_would_not(framework: str, hf: Path) -> None:
    """Our reader is right here and the folder wrong: only somebody else's reader can tell."""
    source, result = RandomSource(toy_config(num_layers=4), 3, "bfloat16"), HFSource(hf)
    config = toy_config(num_layers=4)
    copy(Off(config, 3, "bfloat16"), HFSink(hf.parent / "wrong", config, "bfloat16", Companions()))
    result.hf_folder = None
    assert verify(source, result, framework).passed
    result.hf_folder = hf.parent / "wrong"
    with pytest.raises(UserError, match=r"hf does not compute what random weights .* computes"):
        verify(source, result, framework)


def test_a_folder_that_transformers_cannot_open_is_named(framework: str, hf: Path) -> None:
    source = HFSource(hf)
    (hf / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"hf: transformers .* cannot open it") as raised:
        verify(source, RandomSource(toy_config(num_layers=4), 3, "bfloat16"), framework)
    assert raised.value.flags == ("--no-verify",)


def test_a_result_that_differs_never_appears(
    framework: str, hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def skewed(_: TensorSource, result: TensorSource, framework: str) -> Verification:
        return verify(Off(result.config, 3, "bfloat16"), result, framework)

    monkeypatch.setattr("tandem.conversion.verify.verify", skewed)
    assert main(words(hf, "--ai-framework", framework)) == 2
    assert "first differing tensor is decoder.layers.2.mlp.linear_fc1.weight" in capsys.readouterr().err
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_large_models_are_verified_on_request(
    hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "VERIFIED_PARAMETERS", 1000)
    assert main(words(hf)) == 0
    assert "logits not compared (" in capsys.readouterr().out
    monkeypatch.setattr(command, "installed_frameworks", list)
    (hf.parent / "m").rename(hf.parent / "other")
    assert main(words(hf, "--verify")) == 2
    assert "--verify needs torch or mindspore" in capsys.readouterr().err
