"""An exported folder is complete: transformers loads it offline, answers alike, and stops where training data stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tandem.__main__ import main
from tandem.backends import create_engine
from tandem.backends.interface import EngineSettings
from tandem.checkpoints.detect import open_source
from tandem.conversion.as_trained import export
from tandem.conversion.convert import convert
from tandem.conversion.options import ConvertOptions, ExportOptions
from tandem.data.batch import IGNORE, Sample, collate
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from tandem.quickstart.toy_model import CHAT_TEMPLATE
from tandem.training.run import train
from workspace import Workspace


def document(tokens: list[int]) -> Sample:
    ids = np.asarray(tokens, np.int32)
    return Sample(ids, np.full_like(ids, IGNORE), np.arange(len(ids), dtype=np.int32), (len(ids),))


@pytest.fixture
def exported(workspace: Workspace, framework: str, tmp_path: Path) -> Path:
    """A model overfitted to one question, exported."""
    question = [{"instruction": "What is a tandem?", "input": "", "output": "A bicycle for 2."}]
    (tmp_path / "question.json").write_text(json.dumps(question))
    preprocess(
        PreprocessOptions(
            (str(tmp_path / "question.json"),), str(tmp_path / "one"), str(workspace.hf), prompt_type="qwen3"
        )
    )
    train(
        workspace.settings(
            framework,
            instructions=True,
            data_path=str(tmp_path / "one"),
            train_iters=30,
            micro_batch_size=1,
            global_batch_size=1,
            seq_length=64,
            save=str(tmp_path / "run"),
        )
    )
    export(ExportOptions(load=str(tmp_path / "run"), save_dir=str(tmp_path / "out")))
    return tmp_path / "out"


def test_transformers_loads_it_and_agrees(exported: Path, framework: str) -> None:
    """Equal logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens = tokenizer.encode("Reversed, 123 is 321. Which digit of 90 is largest?")
    source = open_source(exported)
    engine = create_engine(framework, source.config, EngineSettings(training=False))
    engine.load_weights(source)
    ours = engine.logits(collate([document(tokens)]))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(ours - theirs).max() < 1e-4


def test_generate_stops_at_the_end_of_the_turn(exported: Path, framework: str, tmp_path: Path) -> None:
    """The prompt is rendered as in training, by us and by the tokenizer's own template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    ours = open_model(LoadOptions(str(tmp_path / "run"), ai_framework=framework))
    prompt = ours.prompt_ids("What is a tandem?")
    message = [{"role": "user", "content": "What is a tandem?"}]
    assert tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False) == prompt
    assert ours.answer(["What is a tandem?"], Sampling(max_new_tokens=30)) == ["A bicycle for 2."]

    import torch

    model = AutoModelForCausalLM.from_pretrained(exported)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(output[:-1]) == "A bicycle for 2."


def test_the_end_token_of_a_base_model_becomes_the_templates(workspace: Workspace, tmp_path: Path) -> None:
    """The former end token stays as a second one."""
    base = tmp_path / "base"
    shutil.copytree(workspace.hf, base)
    config = json.loads((base / "config.json").read_text())
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    vocabulary = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": ids["<|endoftext|>"]}))
    (base / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "eos_token": "<|endoftext|>"}))
    prefix = str(tmp_path / "chat")
    preprocess(PreprocessOptions((str(workspace.questions),), prefix, str(base), prompt_type="qwen3"))
    settings = workspace.settings(
        "torch",
        instructions=True,
        data_path=prefix,
        load=str(base),
        save=str(tmp_path / "run"),
        train_iters=1,
        lr_warmup_iters=0,
    )
    train(settings)
    export(ExportOptions(load=str(tmp_path / "run"), save_dir=str(tmp_path / "out")))
    read = {
        name: json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    }
    assert read["config.json"]["eos_token_id"] == ids["<|im_end|>"]
    assert read["generation_config.json"]["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


# As Qwen3's: an answer that shall not think begins with an empty thought, and thinking is the default.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<think>\\n\\n</think>\\n\\n' -}}",
    "' -}}{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}",
)


def fine_tuned(
    workspace: Workspace, folder: Path, chat_template: object, place: str, thinking: bool | None, **more: object
) -> Path:
    """A model whose tokenizer has another chat template, fine-tuned for a step; its `run` folder."""
    base = folder / "base"
    shutil.copytree(workspace.hf, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    if place == "file":
        (base / "chat_template.jinja").write_text(str(chat_template))
        del config["chat_template"]
    elif place == "list":
        config["chat_template"] = [
            {"name": "tool_use", "template": "t"},
            {"name": "default", "template": chat_template},
        ]
    else:
        config["chat_template"] = chat_template
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    prefix = str(folder / "chat")
    preprocess(
        PreprocessOptions((str(workspace.questions),), prefix, str(base), prompt_type="qwen3", enable_thinking=thinking)
    )
    values = {"data_path": prefix, "load": str(base), "save": str(folder / "run"), "train_iters": 1}
    train(workspace.settings("torch", instructions=True, lr_warmup_iters=0, **values, **more))
    return folder / "run"


@pytest.mark.parametrize(
    ("place", "command", "thinking"),
    [("config", "export", None), ("list", "convert", None), ("file", "export", False), ("file", "convert", True)],
)
def test_the_written_folder_asks_as_in_training(
    workspace: Workspace, tmp_path: Path, place: str, command: str, thinking: bool | None
) -> None:
    """By default, and with an explicit `enable_thinking`."""
    from transformers import AutoTokenizer

    run = fine_tuned(workspace, tmp_path, THINKING_TEMPLATE, place, thinking)
    out = str(tmp_path / "out")
    words = ["--load", str(run), "--save-dir", out]
    if command == "convert":
        words = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(run), "--save-dir", out]
    assert main([command, *words]) == 0
    asked = open_model(LoadOptions(str(run), ai_framework="torch")).prompt_ids("How?")
    assert open_model(LoadOptions(str(out), ai_framework="torch")).prompt_ids("How?") == asked
    tokenizer = AutoTokenizer.from_pretrained(out)
    message = [{"role": "user", "content": "How?"}]
    ids = [
        tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False, **mode)
        for mode in ({}, {"enable_thinking": False}, {"enable_thinking": True})
    ]
    assert ids[0] == asked == ids[2 if thinking else 1] != ids[1 if thinking else 2]
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert not (tmp_path / "out" / "prompt.json").exists()


@pytest.mark.parametrize("command", ["export", "convert"])
def test_a_peft_folder_asks_as_in_training(
    workspace: Workspace, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its tokenizer's files, as `transformers` reads them; the weights' own are used here, which is said."""
    from transformers import AutoTokenizer

    lora = {"lora_target_modules": ("q_proj",), "lr": 1e-2}
    run = fine_tuned(workspace, tmp_path, THINKING_TEMPLATE, "file", False, **lora)
    out = str(tmp_path / "out")
    words = ["--load", str(run), "--save-dir", out]
    if command == "convert":
        words = ["--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(run), "--save-dir", out]
    assert main([command, *words, "--save-lora-to-hf"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    message = [{"role": "user", "content": "How?"}]
    asked = open_model(LoadOptions(str(run), ai_framework="torch")).prompt_ids("How?")
    assert tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False) == asked
    assert not (tmp_path / "out" / "generation_config.json").exists()
    capsys.readouterr()
    assert main(["generate", "--load", str(tmp_path / "base"), "--lora-load", out, "--prompt", "How?"]) == 0
    assert "its chat template is not used, but that of" in capsys.readouterr().err


def test_a_chat_template_that_cannot_ask_as_in_training_is_said(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fine_tuned(workspace, tmp_path, "Human: {{ messages[0].content }}", "config", None)
    assert main(["export", "--load", str(run), "--save-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "fine-tuned with --prompt-type qwen3" in printed
    assert "the tokenizer's chat template writes another prompt" in printed


def test_another_layout_keeps_what_was_trained_on(workspace: Workspace, tmp_path: Path) -> None:
    """For a native checkpoint made of a native one."""
    run = fine_tuned(workspace, tmp_path, THINKING_TEMPLATE, "config", None)
    words = ["--load-model-type", "mg", "--load-dir", str(run), "--save-dir", str(tmp_path / "tp2")]
    assert main(["convert", *words, "--target-tensor-parallel-size", "2"]) == 0
    asked = [
        open_model(LoadOptions(str(folder), ai_framework="torch")).prompt_ids("How?")
        for folder in (run, tmp_path / "tp2")
    ]
    assert asked[0] == asked[1]


def test_numbers_that_are_wider_than_the_model_was_are_said(workspace: Workspace, tmp_path: Path) -> None:
    """As after a run in bf16 on a device that has none."""
    shutil.copytree(workspace.hf, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({**config, **dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")})
    )
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "mcore"), "--no-verify"]) == 0
    for dtype, is_said in ((None, True), ("bf16", False), ("fp32", False)):
        out = tmp_path / f"out-{dtype}"
        result = export(ExportOptions(str(tmp_path / "mcore"), str(out), params_dtype=dtype))  # type: ignore[arg-type]
        assert any("twice the room" in notice for notice in result.notices) is is_said
    back = convert(
        ConvertOptions(str(tmp_path / "mcore"), str(tmp_path / "back"), load_model_type="mg", save_model_type="hf")
    )
    assert "--params-dtype bf16" in " ".join(back.notices)
