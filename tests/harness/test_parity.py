"""Every sample of `tandem evaluate --tasks` is that of `lm_eval --model hf`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness_tasks import NAMES, Samples

from tandem.config.parsing import from_dict
from tandem.conversion.options import ConvertOptions
from tandem.conversion.run import run_conversion
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.harness.chat import Chat, without_thought
from tandem.training.evaluate_tasks import evaluate_tasks
from workspace import Workspace

# case -> what the peer is given, and what Tandem is
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "shots": ({"shots": 2}, {"num_fewshot": 2}),
    "short": ({"max_length": 40}, {"max_position_embeddings": 40, "tokens_per_batch": 30}),
    "chat": ({"chat": True, "shots": 1}, {"apply_chat_template": True, "num_fewshot": 1}),
    "no thinking": (
        {"chat": True, "enable_thinking": False},
        {"apply_chat_template": True, "enable_thinking": "false"},
    ),
}

QUICK = ("plain", "chat")


def ours(workspace: Workspace, task_folder: Path, output: Path, tasks: Sequence[str] = NAMES, **values: Any) -> Samples:
    settings = {
        "load": str(workspace.hf),
        "tasks": list(tasks),
        "include_path": str(task_folder),
        "log_samples": True,
        "output": str(output),
    }
    found = evaluate_tasks(from_dict({**settings, **values}, "test"))
    assert found is not None
    return dict(found.samples)


def assert_same(found: Samples, expected: Samples) -> None:
    assert found.keys() == expected.keys()
    for task, samples in expected.items():
        assert len(samples) == len(found[task]) > 0
        for one, other in zip(found[task], samples, strict=True):
            same = ("doc_id", "doc", "arguments", "doc_hash", "prompt_hash", "target_hash", "filter")
            assert [one[key] for key in same] == [other[key] for key in same]
            assert one["resps"] == (other["resps"] if task == "toy_answers" else close(other["resps"])), task
            for metric in other["metrics"]:
                assert one[metric] == pytest.approx(other[metric], abs=1e-4), (task, metric)


def close(values: Any) -> Any:
    """Log-likelihoods up to 1e-4, and whether they are greedy."""
    if isinstance(values, list):
        return [close(value) for value in values]
    if isinstance(values, tuple):
        return tuple(close(value) for value in values)
    return values if isinstance(values, bool) else pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow("answers")) for case in CASES]
)
def test_every_sample_is_that_of_lm_eval(
    workspace: Workspace,
    task_folder: Path,
    peer: Callable[..., Samples],
    framework: str,
    tmp_path: Path,
    case: str,
) -> None:
    theirs, values = CASES[case]
    found = ours(workspace, task_folder, tmp_path / "out.json", ai_framework=framework, **values)
    assert_same(found, peer(**theirs))


def test_the_thought_is_cut_off(
    workspace: Workspace, task_folder: Path, peer: Callable[..., Samples], framework: str, tmp_path: Path
) -> None:
    """What a toy takes for the end of a thought: a letter."""
    tasks, output = ("toy_answers",), tmp_path / "out.json"
    values = {"apply_chat_template": True, "enable_thinking": "true", "ai_framework": framework}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tandem.harness.chat.END_OF_THOUGHT", "e")
        found = ours(workspace, task_folder, output, tasks, **values)
    # in a larger batch it goes on after a stop text, and what follows would count
    theirs = peer(tasks=tasks, chat=True, enable_thinking=True, think_end_token="e", batch_size=1)
    assert_same(found, theirs)
    with pytest.raises(UserError, match="--enable-thinking true: the tasks toy_choices compare how likely"):
        ours(workspace, task_folder, tmp_path / "other.json", ["toy_choices"], **values)


def test_a_thought_is_cut_off_where_the_template_lets_a_model_think(workspace: Workspace) -> None:
    """And an answer without one keeps its spaces: code may begin with some."""
    chat = Chat(Tokenizer(workspace.hf))
    assert without_thought("Well.</think>\n\n4", chat) == "4"
    assert without_thought("    return 4", chat) == "    return 4"
    off = dataclasses.replace(chat, enable_thinking=False)
    assert without_thought("Well.</think>\n\n4", off) == "Well.</think>\n\n4"


def test_adapters_next_to_the_weights(
    workspace: Workspace, task_folder: Path, peer: Callable[..., Samples], framework: str, tmp_path: Path
) -> None:
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))
    torch.manual_seed(5)
    base = transformers.AutoModelForCausalLM.from_pretrained(workspace.hf, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path / "adapter"
    peft.get_peft_model(base, config).save_pretrained(folder)
    tasks = ("toy_choices", "toy_answers")
    found = ours(workspace, task_folder, tmp_path / "x.json", tasks, lora_load=str(folder), ai_framework=framework)
    assert_same(found, peer(tasks=tasks, adapter=str(folder)))
    plain = peer(tasks=tasks)
    assert plain["toy_choices"][0]["resps"] != found["toy_choices"][0]["resps"]


@pytest.mark.slow("answers")
@pytest.mark.parametrize("chat", [False, True])
def test_a_toy_with_qwen3s_tokenizer_and_template(
    shared_data: Path, task_folder: Path, peer: Callable[..., Samples], framework: str, tmp_path: Path, chat: bool
) -> None:
    real, toy, hf = shared_data / "qwen3-0.6b", tmp_path / "toy", tmp_path / "hf"
    shutil.copytree(real, toy)
    config = json.loads((real / "config.json").read_text())
    config |= {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}
    config |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
    (toy / "config.json").write_text(json.dumps(config))
    run_conversion(ConvertOptions(str(toy), str(hf), load_model_type="random", save_model_type="hf"))
    tasks = ("toy_choices", "toy_answers", "toy_rolling")
    values = {"apply_chat_template": chat, **({"enable_thinking": "false"} if chat else {})}
    settings = {"load": str(hf), "tasks": list(tasks), "include_path": str(task_folder), "log_samples": True}
    settings |= {"num_fewshot": 1, "output": str(tmp_path / "out.json"), "ai_framework": framework}
    found = evaluate_tasks(from_dict({**settings, **values}, "test"))
    assert found is not None
    thinking = {"enable_thinking": False} if chat else {}
    assert_same(dict(found.samples), peer(tasks=tasks, shots=1, chat=chat, pretrained=str(hf), **thinking))
