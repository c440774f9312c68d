"""Settings from YAML and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.config.settings import Settings
from tandem.config.sources import from_dict, from_yaml, parse_settings, to_yaml
from tandem.config.upstream import split_ignored
from tandem.errors import UserError


def parse(*words: str) -> Settings:
    return parse_settings("pretrain", "", words)[0]


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    """I1."""
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
        ({"seed": "many"}, "expected int"),
        ({"bf16": 1}, "expected bool"),
        ({"lr_decay_style": "step"}, "step"),
        ({"lr": "fast"}, "expected float"),
    ],
)
def test_wrong_yaml_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        from_dict(values, "run.yaml")


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
    rest, notices = split_ignored(words)
    assert rest == ["--lr", "1"]
    assert notices == ["accepted, without effect here: --use-flash-attn --normalization"]


@pytest.mark.parametrize("words", [["--normalization", "LayerNorm"], ["--transformer-impl"], ["--spec", "x", "y"]])
def test_a_flag_that_asks_for_something_else_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=words[0]):
        split_ignored(words)


# I3: a default that changes must change here too, on purpose.
DEFAULTS = {
    "lr_decay_style": "linear",
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "micro_batch_size": 1,
    "seed": 1234,
    "log_interval": 100,
    "eval_interval": 1000,
    "eval_iters": 100,
    "split": "969,30,1",
    "ckpt_format": "native",
    "ai_framework": "torch",
}


def test_defaults_are_frozen() -> None:
    flat = {name: value for group in Settings().to_dict().values() for name, value in group.items()}
    assert {name: flat[name] for name in DEFAULTS} == DEFAULTS
