"""The scripts of Qwen3-30B-A3B: MindSpeed-LLM's layouts, runs that could start, and conversion."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from frameworks import require_framework
from scripts import FRAMEWORKS, HF, MCORE, Site
from tandem.__main__ import main
from tandem.data.preprocess.run import PreprocessOptions, preprocess
from tandem.models.hf_config import to_hf
from tandem.models.published import qwen3_config
from toys import moe_config

NAMES = {"pretrain": "pretrain_qwen3_30b_a3b_4K", "finetune": "tune_qwen3_30b_a3b_4K_full"}
# What MindSpeed-LLM's scripts give: tensor, pipeline, expert.
LAYOUTS = {"pretrain": (1, 4, 4), "finetune": (4, 2, 2)}
Usage = namedtuple("Usage", "total used free")


def script(command: str, framework: str) -> str:
    return f"{framework}/qwen3_moe/{NAMES[command]}_{FRAMEWORKS[framework]}.sh"


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("command", NAMES)
def test_the_layout_is_upstreams(site: Site, launchers: Path, command: str, framework: str) -> None:
    settings = site.run(script(command, framework), launchers=launchers).settings
    parallel, launch = settings.parallel, settings.launch
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    assert (*sizes, parallel.expert_model_parallel_size) == LAYOUTS[command]
    assert parallel.expert_tensor_parallel_size is None
    assert (launch.nnodes, launch.nproc_per_node) == (2, 8)
    assert settings.training.ai_framework == framework
    assert settings.experts.moe_aux_loss_coeff == 0.001
    assert settings.checkpoint.save == "./ckpt/qwen3-30b_a3b" + ("_tune" if command == "finetune" else "")


def test_the_environment_goes_first(site: Site, launchers: Path) -> None:
    values = {"EP": 8, "ETP": 1, "MOE_AUX_LOSS_COEFF": "", "TP": 2}
    settings = site.run(script("finetune", "torch"), launchers=launchers, **values).settings
    assert settings.parallel.expert_model_parallel_size == 8
    assert settings.parallel.expert_tensor_parallel_size == 1
    assert settings.experts.moe_aux_loss_coeff == 0.0


# What the examples' page says of one machine with 8 devices.
ONE_MACHINE = {"NNODES": "1", "TP": "2", "PP": "4", "VPP": "3", "EP": "1"}


@pytest.mark.parametrize(
    ("command", "framework", "variables", "ranks"),
    [
        ("pretrain", "mindspore", {}, "16 processes: tensor 1 x pipeline 4 x data 4, experts shared by 4 ranks"),
        ("finetune", "torch", {}, "16 processes: tensor 4 x pipeline 2 x data 2, experts shared by 2 ranks"),
        ("finetune", "torch", ONE_MACHINE, "8 processes: tensor 2 x pipeline 4 x data 1"),
    ],
)
def test_a_run_could_start(
    shared_data: Path,
    site: Site,
    launchers: Path,
    command: str,
    framework: str,
    variables: dict[str, str],
    ranks: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the real config and tokenizer, in the shipped layout, and in that of the page."""
    require_framework(framework)
    (site.root / HF).mkdir(parents=True)
    (site.root / HF / "config.json").write_text(json.dumps(to_hf(qwen3_config("30B-A3B"))))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (site.root / HF / name).symlink_to(shared_data / "qwen3-0.6b" / name)
    monkeypatch.chdir(site.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**13, 0, 10**13))
    rows = {
        "pretrain": [{"text": "A long text. " * 5000}],
        "finetune": [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(20)],
    }[command]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = {"finetune": {"prompt_type": "qwen3"}}.get(command, {})
    preprocess(PreprocessOptions(("rows.jsonl",), "data", HF, **prompt))
    done = site.run(
        script(command, framework),
        launchers=launchers,
        CKPT_LOAD_DIR="",
        DATA_PATH={"pretrain": "data_text_document", "finetune": "data"}[command],
        EXTRA_ARGS="--dry-run --device npu",
        **variables,
    )
    assert main(done.command) == 0
    text = capsys.readouterr().out
    assert f"> {ranks}; a rank holds " in text
    assert f"> {framework}: qwen3_moe, " in text
    assert "dry run: all of this can start; nothing was trained" in text


@pytest.mark.parametrize("direction", ["hf2mcore", "mcore2hf"])
def test_conversion_names_the_family(site: Site, launchers: Path, direction: str) -> None:
    done = site.run(f"torch/qwen3_moe/ckpt_convert_qwen3_moe_{direction}.sh", launchers=launchers)
    assert done.command[done.command.index("--model-type-hf") + 1] == "qwen3-moe"


@pytest.mark.slow("users")
def test_conversion_keeps_every_bit_of_experts(site: Site) -> None:
    (site.root / "config").mkdir()
    (site.root / "config/config.json").write_text(json.dumps(to_hf(moe_config(), dtype="bfloat16")))
    words = ["convert", "--load-model-type", "random", "--load-dir", str(site.root / "config")]
    assert main([*words, "--save-model-type", "hf", "--save-dir", str(site.root / HF)]) == 0
    folder = "mindspore/qwen3_moe"
    done = site.succeed(f"{folder}/ckpt_convert_qwen3_moe_hf2mcore.sh", EXTRA_ARGS="--target-expert-parallel-size 2")
    assert done.saved == [(1, Path(MCORE))]
    site.succeed(f"{folder}/ckpt_convert_qwen3_moe_mcore2hf.sh", SAVE_DIR="back")
    before, after = (load_file(site.root / path / "model.safetensors") for path in (HF, "back"))
    assert any(".experts.7." in name for name in before)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    refused = site.run("mindspore/qwen3/ckpt_convert_qwen3_hf2mcore.sh", SAVE_DIR="elsewhere")
    assert refused.code == 2
    assert "--model-type-hf qwen3: ./model_from_hf/qwen3_hf/ holds qwen3_moe" in refused.output
