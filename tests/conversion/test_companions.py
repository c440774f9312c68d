"""The small files of a model: which travel with it, what is said of the others, and what a model lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.__main__ import main
from tandem.checkpoints.hf.companions import companion_files, companions_of, with_tokenizer
from tandem.checkpoints.hf.record import RECORD
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from workspace import Workspace

TOYS_OWN = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hf(workspace: Workspace, tmp_path: Path) -> Path:
    shutil.copytree(workspace.hf, tmp_path / "hf")
    return tmp_path / "hf"


def convert(load: Path, save: Path, direction: str, *more: str) -> int:
    source, target = direction.split("-")
    types = ["--load-model-type", source, "--save-model-type", target]
    return main(["convert", "--load-dir", str(load), "--save-dir", str(save), *types, *more])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values} if path.exists() else values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_only_a_models_files_travel(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through a checkpoint and back. An adapter's config would make the export unloadable."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("train_data.json", "adapter_config.json", "all_results.json", "modeling_own.py"):
        (hf / name).write_text("{}")
    for name in ("generation_config.json", "special_tokens_map.json"):
        (hf / name).write_text(json.dumps({"eos_token_id": 1} if "generation" in name else {"eos_token": "<|im_end|>"}))
    assert convert(hf, tmp_path / "m", "hf-mg") == 0
    printed = capsys.readouterr().out
    others = "adapter_config.json, all_results.json, modeling_own.py, train_data.json"
    assert f"not copied, as not a model's files: {others}" in printed
    assert "adapter_config.json is not read" in printed
    assert convert(tmp_path / "m", tmp_path / "back", "mg-hf") == 0
    assert "not copied" not in capsys.readouterr().out
    kept = {"generation_config.json", "special_tokens_map.json"}
    assert names(tmp_path / "m/iter_0000001/hf") == (TOYS_OWN | kept) - {"model.safetensors"}
    assert names(tmp_path / "back") == TOYS_OWN | kept | {RECORD}
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    AutoTokenizer.from_pretrained(tmp_path / "back")


def test_named_templates_travel(hf: Path, tmp_path: Path) -> None:
    """As transformers writes them: the default in its file, the others in a folder of their own."""
    from transformers import AutoTokenizer

    (hf / "chat_template.jinja").write_text("{{ messages }}")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert AutoTokenizer.from_pretrained(hf).chat_template == templates
    assert convert(hf, tmp_path / "m", "hf-mg") == 0
    assert convert(tmp_path / "m", tmp_path / "back", "mg-hf") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == templates
    without = with_tokenizer(companions_of(tmp_path / "back"), shutil.copytree(hf, tmp_path / "other"))
    assert [path.parent.parent for path in without.files if path.name == "tool_use.jinja"] == [tmp_path / "other"]


def dangle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/aeb1307")


@pytest.mark.parametrize(
    ("name", "spoil", "named"),
    [
        ("tokenizer.json", dangle, "a link to ../../blobs/aeb1307, which is not there"),
        ("chat_template.jinja", dangle, "a link to ../../blobs/aeb1307, which is not there"),
        (
            "tokenizer.json",
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git lfs pull",
        ),
        ("tokenizer_config.json", lambda path: path.write_text('{"eos_token": "<|im'), "not valid JSON"),
        ("generation_config.json", lambda path: path.write_text("[]"), "holds list, not a JSON object"),
        ("vocab.json", lambda path: path.write_text('{"a": "' + "x" * 1_100_000), "cut short"),
    ],
)
def test_each_file_is_checked(name: str, spoil: Callable[[Path], Any], named: str, hf: Path) -> None:
    spoil(hf / name)
    with pytest.raises(UserError) as raised:
        companion_files(hf)
    assert str(hf / name) in str(raised.value)
    assert named in str(raised.value)


def test_a_large_file_that_is_whole_is_kept(hf: Path) -> None:
    (hf / "vocab.json").write_text(json.dumps({f"token {number}": number for number in range(60_000)}) + "\n")
    assert (hf / "vocab.json").stat().st_size > 1_000_000
    assert hf / "vocab.json" in companion_files(hf)


def test_a_tokenizer_of_another_folder_comes_whole(hf: Path, tmp_path: Path) -> None:
    """No file of the replaced tokenizer stays: its chat template would win over the new one's."""
    (hf / "chat_template.jinja").write_text("old")
    (hf / "generation_config.json").write_text('{"eos_token_id": 1}')
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, other)
    together = with_tokenizer(companions_of(hf), other)
    assert [path.relative_to(tmp_path) for path in together.files] == [
        Path("hf/generation_config.json"),
        Path("other/tokenizer.json"),
        Path("other/tokenizer_config.json"),
    ]
    assert with_tokenizer(companions_of(hf), None).files == companions_of(hf).files


def without_tokenizer(hf: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (hf / name).unlink()
    change(hf / "config.json", eos_token_id=None)


def without_ends_and_template(hf: Path) -> None:
    change(hf / "tokenizer_config.json", eos_token=None, chat_template=None)
    change(hf / "config.json", eos_token_id=None)


def only_a_processors_template(hf: Path) -> None:
    change(hf / "tokenizer_config.json", chat_template=None)
    (hf / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')


def only_a_template_for_tools(hf: Path) -> None:
    change(hf / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "{{ messages }}"}])


@pytest.mark.parametrize("spoil", [only_a_processors_template, only_a_template_for_tools])
def test_transformers_finds_no_template_either(spoil: Callable[[Path], Any], hf: Path) -> None:
    spoil(hf)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(hf)
    for tokenizer in (theirs, Tokenizer(hf)):
        with pytest.raises((ValueError, UserError)):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without_tokenizer, "the model has no tokenizer and no end token (eos_token_id) and no chat template: "),
        (without_ends_and_template, "the model has no end token (eos_token_id) and no chat template: "),
        (lambda hf: change(hf / "tokenizer_config.json", chat_template=None), "the model has no chat template: "),
        (only_a_processors_template, "chat_template.json: processors of transformers read it"),
        (only_a_template_for_tools, "the model has no chat template (only tool_use): "),
        (lambda hf: (hf / "tokenizer.json").rename(hf / "vocab.json"), "no tokenizer.json (only vocab.json)"),
        (lambda hf: (hf / "tokenizer_config.json").unlink(), "tokenizer_config.json: no such file"),
        (lambda hf: None, None),
    ],
)
def test_what_a_model_lacks_is_said(
    spoil: Callable[[Path], Any], named: str | None, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At conversion and at export."""
    spoil(hf)
    assert convert(hf, tmp_path / "m", "hf-mg", "--no-verify") == 0
    converted = capsys.readouterr().out
    assert main(["export", "--load", str(tmp_path / "m"), "--save-dir", str(tmp_path / "o"), "--no-verify"]) == 0
    for printed in (converted, capsys.readouterr().out):
        if named is None:
            assert "> " not in printed
        else:
            assert named in printed


def test_a_result_is_not_taken_for_a_template(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Upstream's second converter writes into its target, which then must not be there. Its first one takes the
    original model there as a template."""
    assert convert(hf, tmp_path / "m", "hf-mg", "--no-verify") == 0
    for more in ([], ["--hf-cfg-dir", str(hf)]):
        assert convert(tmp_path / "m", tmp_path / "out", "mg-hf", "--no-verify", *more) == 0
        before = (tmp_path / "out/config.json").read_bytes()
        capsys.readouterr()
        assert convert(tmp_path / "m", tmp_path / "out", "mg-hf", "--no-verify", *more) == 2
        assert "remove it" in " ".join(capsys.readouterr().err.split())
        assert (tmp_path / "out/config.json").read_bytes() == before
        assert not (tmp_path / "out/mg2hf").exists()
        shutil.rmtree(tmp_path / "out")
    assert convert(tmp_path / "m", hf, "mg-hf", "--no-verify") == 0
    assert (hf / "mg2hf/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert convert(tmp_path / "m", hf, "mg-hf", "--no-verify") == 2
    assert convert(tmp_path / "m", hf, "mg-hf", "--no-verify", "--hf-cfg-dir", str(hf)) == 2


def test_a_tokenizer_of_transformers_5_is_written_for_4_too(hf: Path, tmp_path: Path) -> None:
    """It knows neither the class nor a list of extra tokens; transformers 5 reads what is written."""
    from transformers import AutoTokenizer

    change(hf / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<think>"])
    assert convert(hf, tmp_path / "m", "hf-mg", "--no-verify") == 0
    assert convert(tmp_path / "m", tmp_path / "back", "mg-hf", "--no-verify") == 0
    written = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["model_input_names"] == ["input_ids", "attention_mask"]  # 4 gives token_type_ids otherwise
    assert (written["additional_special_tokens"], "extra_special_tokens" in written) == (["<think>"], False)
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (hf, tmp_path / "back"))
    assert one.extra_special_tokens == other.extra_special_tokens == ["<think>"]
    assert one.encode("x<think>y") == other.encode("x<think>y")
