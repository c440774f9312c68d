"""Upstream's scripts that generate: each command line is taken, with the name of the program and the paths changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.generate import GenerateOptions, read_options
from tandem.errors import UserError
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid
from tandem.training.start.weights import check_model_flags

LINES = Path(__file__).with_name("upstream_generate.txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = {line.split()[0]: line.split()[1:] for line in LINES if not line.startswith("#")}
QWEN3 = [name for name in SCRIPTS if "qwen3" in name]


def options_of(name: str, *more: str) -> tuple[GenerateOptions, list[str]]:
    return read_options([*(word for word in SCRIPTS[name] if word != "inference.py"), *more])


def test_how_many_there_are() -> None:
    assert (len(SCRIPTS), len(QWEN3)) == (10, 8)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_taken(name: str) -> None:
    options, notices = options_of(name)
    assert options.model.load == options.model.tokenizer_name_or_path == "PATH_"
    assert options.sampling.max_new_tokens == 256
    assert options.task == ("greedy", "do_sample", "beam_search", "beam_search_with_sampling", "chat")
    assert options.model.bf16 == ("--bf16" in SCRIPTS[name])
    assert len(notices) == 1
    assert "accepted, without effect here" in notices[0]


@pytest.mark.parametrize("name", QWEN3)
def test_its_model_and_its_processes_are_possible(name: str) -> None:
    options, _ = options_of(name)
    size = name.split("qwen3_")[1].removesuffix("_ptd.sh").replace("point", ".").replace("_", "-").upper()
    config = qwen3_config(size)
    check_model_flags(options.architecture, options.experts, 0, config)
    layout = options.model.layout
    layout.balanced(config.num_layers).check(config)
    copies = {"0.6B": 1, "1.7B": 8, "4B": 8, "8B": 4, "14B": 1, "32B": 1, "30B-A3B": 1, "235B-A22B": 1}
    grid = Grid(layout, (options.launch.nproc_per_node or 1) * options.launch.nnodes)
    assert grid.copies_of_the_model == copies[size]


def test_a_task_of_ones_own_is_run_alone() -> None:
    options, _ = options_of(QWEN3[0], "--task", "greedy", "chat")
    assert options.task == ("greedy", "chat")
    assert not read_options(["model", "hi"])[0].task
    with pytest.raises(UserError, match="--task unknown: expected greedy"):
        options_of(QWEN3[0], "--task", "unknown")
