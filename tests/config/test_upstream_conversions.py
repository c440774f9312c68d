"""Upstream's own scripts that convert weights and data: each command line is taken, with the program's name changed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tandem.cli import convert, preprocess
from tandem.cli.arguments import parse
from tandem.config.upstream.flags import CONVERT_IGNORED, PREPROCESS_IGNORED, split_ignored
from tandem.conversion.options import ConvertOptions
from tandem.data.handlers.registry import HANDLER_NAMES
from tandem.errors import UserError
from tandem.models.published import qwen3_config

LINES = Path(__file__).with_name("upstream_conversions.txt").read_text(encoding="utf-8").splitlines()
SCRIPTS = {line.split()[0]: line.split()[2:] for line in LINES if not line.startswith("#")}
WEIGHTS, DATA = ([name for name in SCRIPTS if word in name] for word in ("ckpt_convert", "data_convert"))
# It asks for chunks of two layers, and each of its two stages has 47.
IMPOSSIBLE = "mindspore/qwen3_moe/ckpt_convert_qwen3_moe_235b_hf2mcore_ms.sh"


SIZES = {"235b": "235B-A22B", "480b": "Coder-480B-A35B", "qwen3_moe": "30B-A3B", "qwen3": "32B"}


def size_of(name: str) -> str:
    """The size that a script names, or one for which it is meant."""
    return next(size for word, size in SIZES.items() if word in name)


def options_of(name: str) -> tuple[ConvertOptions, list[str]]:
    rest, notices, _ = split_ignored(SCRIPTS[name], CONVERT_IGNORED)
    return parse(ConvertOptions, "convert", "", rest, first=convert.FIRST), notices


def test_how_many_there_are() -> None:
    assert (len(WEIGHTS), len(DATA), len(SCRIPTS)) == (13, 8, 21)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    """The layout that is asked for is possible for the model, and the flags that have no effect are told."""
    options, notices = options_of(name)
    assert options.model_type_hf == ("qwen3-moe" if "qwen3_moe" in name else "qwen3")
    assert {options.load_model_type, options.save_model_type} == {"hf", "mg"}
    assert len(notices) == ("--use-mcore-models" in SCRIPTS[name])
    if name == IMPOSSIBLE:
        with pytest.raises(
            UserError,
            match="-stage 2: expected a number that divides the 47 layers",
        ):
            options.target_layout().check(qwen3_config(size_of(name)))
        return
    if options.save_model_type == "mg":
        options.target_layout().check(qwen3_config(size_of(name)))
    elif "noop" in " ".join(SCRIPTS[name]):
        assert options.source_layers()[0] in ((94, 95), (0, 63))


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    words = shlex.split(" ".join(SCRIPTS[name]), posix=False)
    rest, notices, _ = split_ignored(words, PREPROCESS_IGNORED)
    flags = parse(preprocess.PreprocessFlags, "preprocess", "", rest, first=preprocess.FIRST)
    assert not notices
    assert flags.handler_name in HANDLER_NAMES
    assert flags.workers == 4
