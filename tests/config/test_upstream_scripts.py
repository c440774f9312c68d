"""Upstream's own scripts: each of its command lines is taken, with the name of the program and the paths changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tandem.cli.settings import parse_settings
from tandem.config.checks import check_batch_sizes, check_settings
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.frameworks import SPELLINGS
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid
from tandem.training.start.weights import check_model_flags

LINES = Path(__file__).with_name("upstream_scripts.txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = {line.split()[0]: line.split()[1:] for line in LINES if not line.startswith("#")}
PROGRAMS = {"pretrain_gpt.py": "pretrain", "posttrain_gpt.py": "finetune"}
# These ask for what is not there. The message names the flag.
REFUSED = {
    "mcore/tune_qwen3_32b_256K_full_pack_A3_ptd.sh": "--context-parallel-size 8",
    "mcore/tune_qwen3_32b_32K_full_pack_A3_ptd.sh": "--context-parallel-size 2",
    "mcore/tune_qwen3_235b_a22b_64K_full_pack_A3_ptd.sh": "--context-parallel-size 4",
    "mcore/tune_qwen3_235b_a22b_128K_full_pack_A3_ptd.sh": "--context-parallel-size 8",
    "mcore/tune_qwen3_235b_a22b_256K_full_pack_A3_ptd.sh": "--context-parallel-size 8",
    "mcore/tune_qwen3_30b_a3b_256K_full_pack_A3_ptd.sh": "--context-parallel-size 16",
    "mindspore/tune_qwen3_235b_a22b_64K_full_pack_A3_ms.sh": "--context-parallel-size 8",
    "mindspore/tune_qwen3_235b_a22b_256K_full_pack_A3_ms.sh": "--context-parallel-size 16",
    "mcore/tune_qwen3_235b_a22b_32K_lora_pack_A2_ptd.sh": "--attention-dropout 0.05: only 0 is supported",
}
ACCEPTED = [name for name in SCRIPTS if name not in REFUSED]


def size_of(name: str) -> str:
    """The size of a script's model: 0.6B, 30B-A3B."""
    size, experts = name.split("qwen3_")[1].split("_")[:2]
    if size == "480b":
        return "Coder-480B-A35B"
    return (f"{size}-{experts}" if experts in ("a3b", "a22b") else size.replace("point", ".")).upper()


def settings_of(name: str) -> tuple[Settings, list[str]]:
    """The settings of a script, checked as far as that needs no files, and the notices."""
    words = SCRIPTS[name]
    program = next(word for word in words if word in PROGRAMS)
    settings, notices = parse_settings(PROGRAMS[program], "", [word for word in words if word != program])
    check_settings(settings)
    SPELLINGS["mindspore" if name.startswith("mindspore/") else "torch"].check(
        shards_weights=settings.parallel.use_torch_fsdp2
    )
    launch, layout = settings.launch, settings.parallel.layout
    check_batch_sizes(settings.training, Grid(layout, (launch.nproc_per_node or 1) * launch.nnodes))
    config = qwen3_config(size_of(name))
    check_model_flags(settings.model, settings.experts, settings.data.seq_length, config, layout.noop_layers)
    layout.check(config)
    return settings, notices


def test_how_many_there_are() -> None:
    assert (len(SCRIPTS), len(ACCEPTED)) == (63, 54)
    of_experts = [name for name in SCRIPTS if "_a3b_" in name or "_a22b_" in name or "_480b_" in name]
    assert (len(of_experts), len([name for name in of_experts if name in ACCEPTED])) == (20, 13)
    of_context = [name for name, words in REFUSED.items() if words.startswith("--context-parallel-size")]
    assert len(of_context) == len(REFUSED) - 1
    machines = Counter(settings_of(name)[0].launch.nnodes for name in ACCEPTED)
    assert machines == {1: 39, 2: 9, 16: 6}


def test_stages_of_experts_are_interleaved_on_both_frameworks() -> None:
    chunks = {
        name: (parallel.num_layers_per_virtual_pipeline_stage, parallel.expert_model_parallel_size)
        for name in ACCEPTED
        if (parallel := settings_of(name)[0].parallel).num_layers_per_virtual_pipeline_stage
    }
    assert chunks["mindspore/pretrain_qwen3_235b_a22b_4k_A3_ms.sh"] == (8, 32)
    assert chunks["mindspore/pretrain_qwen3_32b_4K_ms.sh"] == (4, 1)
    assert len([name for name in chunks if name.startswith("mindspore/")]) == 4


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_script_is_taken(name: str) -> None:
    settings, notices = settings_of(name)
    assert settings.model.num_layers is not None
    assert len(notices) == 1  # of flags without effect
    assert "accepted, without effect here" in notices[0]


def test_the_script_of_pairs_trains_on_pairs() -> None:
    (name,) = (name for name in ACCEPTED if "/dpo_" in name)
    assert settings_of(name)[0].data.stage == "dpo"


def test_scripts_of_adapters_train_adapters() -> None:
    """All of them train these modules with these values, which Tandem hears."""
    adapters = [settings_of(name)[0].lora for name in ACCEPTED if "_lora_" in name]
    assert len(adapters) == 13  # and one is refused
    modules = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    assert {(lora.lora_r, lora.lora_alpha, lora.lora_target_modules) for lora in adapters} == {(16, 32, modules)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        settings_of(name)
