"""Settings from YAML and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cli.arguments import parse as parse_options
from tandem.cli.settings import parse_settings
from tandem.config import checks as ranges
from tandem.config.parsing import from_dict, from_yaml, to_yaml
from tandem.config.settings import Settings
from tandem.config.upstream.flags import CONVERT_IGNORED, split_ignored
from tandem.conversion.options import ConvertOptions
from tandem.errors import UserError
from tandem.models.lora import Lora


def parse(*words: str) -> Settings:
    return parse_settings("pretrain", "", words)[0]


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {train_iters: 5, seed: 7}\nlr: 1e-4\ndata-path: a\n")
    settings = parse("--config", str(file), "--train-iters", "9")
    assert (settings.training.train_iters, settings.training.seed) == (9, 7)
    assert (settings.optimizer.lr, settings.data.data_path) == (1e-4, ("a",))


def test_a_saved_run_reads_back_as_it_was(tmp_path: Path) -> None:
    settings = parse("--lr", "3e-4", "--data-path", "a", "b", "--bf16", "--lr-warmup-fraction", "0.01")
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    assert from_yaml(tmp_path / "settings.yaml") == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"train_itrs": 3}, "did you mean 'train_iters'"),
        ({"training": {"lr": 3}}, "group training: unknown setting 'lr'"),
        ({"seed": "many"}, "expected a whole number"),
        ({"bf16": 1}, "expected true or false"),
        ({"lr_decay_style": "step"}, "'step': expected constant or linear or cosine or"),
        ({"enable_thinking": "yes"}, "expected true or false or none$"),
        ({"lr": "fast"}, "expected a number"),
    ],
)
def test_wrong_yaml_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_dict(values, "run.yaml")


def test_a_choice_that_yaml_takes_for_a_truth_value() -> None:
    assert from_dict({"enable_thinking": True}, "run.yaml").data.enable_thinking == "true"


def test_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        from_yaml(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="No such file"):
        from_yaml(tmp_path / "y.yaml")


def test_repeated_flags_and_underscores_are_accepted() -> None:
    assert parse("--bf16", "--bf16", "--train_iters=4").training.train_iters == 4


def test_flags_without_effect_are_taken_out_and_named_once() -> None:
    words = ["--use-flash-attn", "--lr", "1", "--normalization", "RMSNorm", "--use-flash-attn"]
    rest, notices, problems = split_ignored(words)
    assert (rest, problems) == (["--lr", "1"], [])
    assert notices == ["accepted, without effect here: --use-flash-attn --normalization"]


@pytest.mark.parametrize("words", [["--normalization", "LayerNorm"], ["--transformer-impl"], ["--spec", "x", "y"]])
def test_a_flag_that_asks_for_something_else_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0]):
        parse_settings("pretrain", "", words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--micro-batch-size 0", "1 or more"),
        ("--micro-batch-size -1", "1 or more"),
        ("--seq-length 0", "1 or more"),
        ("--tensor-model-parallel-size 0", "1 or more"),
        ("--rampup-batch-size -2 2 8", "0 or more"),
        ("--lr nan", "0 or more"),
        ("--weight-decay -0.1", "0 or more"),
        ("--adam-beta2 1", "a number from 0 to below 1"),
        ("--loss-scale inf", "a positive number"),
        ("--seed 4294967296", "4294967295 or less"),
        ("--save-interval 0", "1 or more"),
    ],
)
def test_a_number_that_no_run_can_use_is_refused(words: str, expected: str) -> None:
    flag = words.split()[0]
    with pytest.raises(UserError, match=f"{flag} .*: expected {expected}"):
        parse(*words.split())


def test_every_range_is_of_a_setting() -> None:
    names = {name for group in Settings().to_dict().values() for name in group}
    assert ranges.ONE_OR_MORE | ranges.ABOVE_ZERO | ranges.BELOW_ONE | ranges.LARGEST.keys() <= names


# A default that changes must change here too, on purpose. What is not named is off: None, False, 0 or empty.
DEFAULTS = {
    "lora_ckpt_filter": True,
    "dpo_loss_type": "sigmoid",
    "dpo_beta": 0.1,
    "orpo_beta": 0.1,
    "simpo_beta": 2.5,
    "gamma_beta_ratio": 1.4,
    "simpo_loss_type": "sigmoid",
    "kto_beta": 0.1,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_token_drop_policy": "probs",
    "distributed_timeout_minutes": 10,
    "json_keys": ["text"],
    "special_tokens_in_text": "encode",
    "train_turns": "all",
    "over_long": "trim",
    "on_bad": "stop",
    "workers": 1,
    "split": "969,30,1",
    "seq_length": 4096,
    "tokenizer_type": "PretrainedFromHF",
    "lr_decay_style": "linear",
    "lr_wsd_decay_style": "exponential",
    "weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "ai_framework": "torch",
    "micro_batch_size": 1,
    "seed": 1234,
    "initial_loss_scale": 2.0**32,
    "min_loss_scale": 1.0,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "on_bad_step": "stop",
    "max_consecutive_skips": 10,
    "spiky_loss_factor": 2.0,
    "eval_interval": 1000,
    "eval_iters": 100,
    "tokens_per_batch": 4096,
    "log_interval": 100,
    "tensorboard_log_interval": 1,
    "profile_step_start": 10,
    "profile_step_end": 12,
    "ckpt_format": "native",
    "nnodes": 1,
    "master_addr": "127.0.0.1",
}


def test_defaults_are_frozen() -> None:
    flat = {name: value for group in Settings().to_dict().values() for name, value in group.items()}
    assert {name: value for name, value in flat.items() if value} == DEFAULTS


def test_everything_wrong_with_a_command_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("min_lr: 1\nbftn: true\n")
    refused = ["--o2-optimizer", "--fix-router", "yes", "--normalization", "LayerNorm"]
    for words, expected in (
        ([*refused, "--train-itrs", "3", "--lr", "-1"], [*refused[:2], "--normalization", "--train-itrs", "--lr -1"]),
        ([*refused, "--lr", "x"], [*refused[:2], "--normalization", "--lr x"]),
        (
            ["--config", str(file), "--fix-router", "--lrr", "1", "--seed", "-1"],
            [str(file), "--fix-router", "--lrr", "--seed -1"],
        ),
        (["--dpo-beta", "0.5", "--lr", "-1"], ["--lr -1", "--dpo-beta 0.5"]),
    ):
        with pytest.raises(UserError) as error:
            parse(*words)
        assert len(error.value.problems) == len(expected)
        for problem, start in zip(error.value.problems, expected, strict=True):
            assert problem.startswith(start)


def test_numbers_of_adapters_are_named_as_they_are_typed() -> None:
    for values, expected in (
        ({"r": 0, "lora_dropout": 1}, ("--lora-r 0: expected a whole number", "--lora-dropout 1: expected")),
        ({"lora_dropout": 0.5, "use_dora": True}, ("--lora-dropout 0.5 and --lora-use-dora exclude each other",)),
        ({"target_modules": ("q_proj",), "lora_alpha": -1}, ("--lora-alpha -1: expected a number above 0",)),
    ):
        with pytest.raises(UserError) as error:
            Lora.of_flags(**values)
        assert len(error.value.problems) == len(expected)
        assert all(map(str.startswith, error.value.problems, expected))


def test_a_word_that_may_belong_to_a_wrong_flag_is_not_said_to_be_missing() -> None:
    """After an unknown flag, nobody can tell which words are its values."""
    for words, wrong in ((["--unknown", "A", "B"], "--unknown"), (["A", "--add-dense-bias", "B"], "--add-dense-bias")):
        rest, _, problems = split_ignored(words, CONVERT_IGNORED)
        with pytest.raises(UserError) as error:
            parse_options(ConvertOptions, "convert", "", rest, problems=problems)
        (problem,) = error.value.problems
        assert problem.startswith(wrong)
