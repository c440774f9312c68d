"""Flags that say which layers have experts, compared with the weights."""

from __future__ import annotations

import pytest

from tandem.cli.settings import parse_settings
from tandem.errors import UserError
from tandem.models.config import ModelConfig
from tandem.models.experts import parse_layer_freq
from tandem.training.start.weights import check_model_flags
from toys import moe_config, toy_config

ALL = moe_config()
FIRST_DENSE = moe_config(mlp_only_layers=(0,))
LAYERS = ALL.num_layers


def check(line: str, config: ModelConfig = ALL, noop_layers: tuple[int, ...] = ()) -> None:
    settings, _ = parse_settings("pretrain", "", line.split())
    check_model_flags(settings.model, settings.experts, 8, config, noop_layers)


@pytest.mark.parametrize("line", ["--moe-layer-freq 1", "--moe-layer-freq -1", f"--moe-layer-freq ([1]*{LAYERS})"])
def test_experts_in_all_layers(line: str) -> None:
    check(line)
    check(f"{line} --first-k-dense-replace 0")
    check(f"{line} --first-k-dense-replace -1")
    check(f"{line} --first-k-dense-replace 1", FIRST_DENSE)
    with pytest.raises(UserError, match=r"contradicts the weights' config, which has experts in all layers but 0: "):
        check(line, FIRST_DENSE)


def test_a_list_marks_the_layers_with_experts() -> None:
    check(f"--moe-layer-freq [0]+[1]*{LAYERS - 1}", FIRST_DENSE)
    with pytest.raises(UserError, match=r"which has experts in all layers: leave it out"):
        check(f"--moe-layer-freq [0]+[1]*{LAYERS - 1}")
    with pytest.raises(UserError, match=rf"--moe-layer-freq \[1,1\]: expected a mark for each of {LAYERS + 1} layers"):
        check("--moe-layer-freq [1,1]", noop_layers=(LAYERS,))


def test_layers_that_stay_empty_count_as_in_megatron() -> None:
    check(f"--moe-layer-freq [0]*2+[1]*{LAYERS - 1}", FIRST_DENSE, noop_layers=(0,))
    every_second = moe_config(mlp_only_layers=tuple(range(1, LAYERS, 2)))
    check("--moe-layer-freq 2", every_second)
    with pytest.raises(UserError, match="--moe-layer-freq 2 contradicts"):
        check("--moe-layer-freq 2", every_second, noop_layers=(0,))


@pytest.mark.parametrize("line", ["--moe-layer-freq 1", "--first-k-dense-replace 0"])
def test_a_dense_model_has_no_such_layers(line: str) -> None:
    with pytest.raises(UserError, match=f"{line}: the weights' config has no experts"):
        check(line, toy_config())


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("-1", -1), (" ([0]*3+[1]*3)*2", [0, 0, 0, 1, 1, 1] * 2), ("2*[1]", [1, 1]), ("[0,1]", [0, 1])],
)
def test_lists_are_those_of_megatron(text: str, value: object) -> None:
    assert parse_layer_freq(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "all",
        "[]",
        "[2]",
        "[[1]]",
        "[1]*[1]",
        "1+[1]",
        "[1]*10**9",
        "[1]*99999*99999",
        "__import__('os')",
        "1.5",
        "[",
    ],
)
def test_what_is_no_list_of_layers_is_said(text: str) -> None:
    with pytest.raises(UserError, match=r"--moe-layer-freq .*: expected a number, or a list such as"):
        parse_layer_freq(text)


def test_it_is_said_together_with_what_else_is_wrong() -> None:
    with pytest.raises(UserError) as caught:
        check("--moe-layer-freq all --num-layers 99")
    assert [problem.split()[0] for problem in caught.value.problems] == ["--num-layers", "--moe-layer-freq"]
