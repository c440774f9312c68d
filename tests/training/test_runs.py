"""Whole runs: resuming bit for bit, going on with the other backend, refusing bad starts."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from frameworks import require_framework
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.interface import TENSOR_KINDS, dtype_name
from tandem.checkpoints.native.source import NativeSource
from tandem.errors import UserError
from tandem.models.hf_config import from_hf
from tandem.models.tensors import EMBEDDING, tensor_table
from tandem.training.logs.log import StepRecord
from tandem.training.run import train
from workspace import Workspace

OTHER = {"torch": "mindspore", "mindspore": "torch"}
# the training line that Megatron's users parse
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(\d+)/ +\d+ \| consumed samples: +(\d+) \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| learning rate: (\d\.\d{6}E[+-]\d\d) \| global batch size: +\d+ \| "
    r"lm loss: (\d\.\d{6}E[+-]\d\d) \| loss scale: 1\.0 \| grad norm: [\d.]+ \| "
    r"number of skipped iterations: +0 \| number of nan iterations: +0 \|"
)


def run(workspace: Workspace, framework: str, **values: object) -> list[StepRecord]:
    records: list[StepRecord] = []
    train(workspace.settings(framework, **values), records.append)
    return records


def losses(records: list[StepRecord]) -> list[float]:
    return [record.loss for record in records]


def state(folder: Path) -> dict[str, np.ndarray]:
    source = open_source(folder)
    assert set(source.kinds()) == {"model", "exp_avg", "exp_avg_sq"}
    return {
        f"{kind} {name}": source.read(name, kind)
        for kind in TENSOR_KINDS
        if kind in source.kinds()
        for name in tensor_table(source.config)
    }


Whole = Callable[[str, bool], tuple[list[StepRecord], Path]]
STEPS_OF_8 = {"global_batch_size": 8, "micro_batch_size": 4}


@pytest.fixture(scope="module")
def whole(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """20 steps of a framework on text or instructions, trained once, and where they are saved."""

    @functools.cache
    def train_whole(framework: str, instructions: bool) -> tuple[list[StepRecord], Path]:
        folder = tmp_path_factory.mktemp("whole")
        return run(workspace, framework, save=str(folder), instructions=instructions, **STEPS_OF_8), folder

    return train_whole


@pytest.mark.parametrize(
    ("instructions", "stop"), [(False, 5), pytest.param(False, 13, marks=pytest.mark.slow("jobs")), (True, 18)]
)
def test_resuming_is_bitwise(
    workspace: Workspace, framework: str, instructions: bool, stop: int, whole: Whole, tmp_path: Path
) -> None:
    """20 steps == some steps, stop, resume to 20, stopping inside the first epoch and inside a later one."""
    common = {"instructions": instructions, **STEPS_OF_8}
    unbroken, folder = whole(framework, instructions)
    first = run(workspace, framework, save=str(tmp_path / "b"), exit_interval=stop, **common)
    assert len(first) == stop
    second = run(workspace, framework, save=str(tmp_path / "b"), load=str(tmp_path / "b"), **common)
    assert [record.iteration for record in second] == list(range(stop + 1, 21))
    assert losses(first + second) == losses(unbroken)
    assert [r.lr for r in first + second] == [r.lr for r in unbroken]
    expected, actual = state(folder), state(tmp_path / "b")
    assert expected.keys() == actual.keys()
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow("jobs")
def test_resuming_with_moments_in_bf16_is_bitwise(workspace: Workspace, tmp_path: Path) -> None:
    common = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}
    common |= {"adam_beta2": 0.95, **STEPS_OF_8}
    framework = require_framework("torch")
    unbroken = run(workspace, framework, save=str(tmp_path / "a"), **common)
    first = run(workspace, framework, save=str(tmp_path / "b"), exit_interval=7, **common)
    second = run(workspace, framework, save=str(tmp_path / "b"), load=str(tmp_path / "b"), **common)
    assert losses(first + second) == losses(unbroken)
    expected, actual = state(tmp_path / "a"), state(tmp_path / "b")
    assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    kept = open_source(tmp_path / "b")
    assert [dtype_name(kept.dtype(EMBEDDING, kind)) for kind in kept.kinds()] == ["float32", "bfloat16", "bfloat16"]


@pytest.mark.parametrize("instructions", [False, True], ids=["pretrain", "sft"])
def test_both_backends_take_the_same_20_steps(workspace: Workspace, instructions: bool) -> None:
    for name in OTHER:
        require_framework(name)
    one, other = (run(workspace, name, instructions=instructions) for name in OTHER)
    assert losses(one) == pytest.approx(losses(other), abs=1e-4)
    assert losses(one)[-1] < losses(one)[0] - 0.5


def test_one_backend_goes_on_from_the_other(workspace: Workspace, framework: str, tmp_path: Path) -> None:
    """Saved on one, resumed on the other; the files have the same names, shapes and index."""
    other = require_framework(OTHER[framework])
    unbroken = run(workspace, framework, save=str(tmp_path / "a"))
    first = run(workspace, framework, save=str(tmp_path / "b"), exit_interval=10)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    second = run(workspace, other, save=str(tmp_path / "b"), load=str(tmp_path / "b"))
    assert losses(first + second) == pytest.approx(losses(unbroken), abs=1e-4)
    mine, theirs = open_source(tmp_path / "a"), open_source(tmp_path / "b")
    assert isinstance(mine, NativeSource)
    assert isinstance(theirs, NativeSource)
    files = [sorted(str(p.relative_to(s.folder)) for p in s.folder.rglob("*")) for s in (mine, theirs)]
    assert files[0] == files[1]
    indexes = [json.loads((source.folder / "index.json").read_text()) for source in (mine, theirs)]
    for index in indexes:
        for tensor in index["tensors"].values():
            for part in tensor["slices"]:
                del part["sha256"]  # of the values, which agree to rounding
    assert indexes[0] == indexes[1]
    assert mine.document("trainer_state.json") == theirs.document("trainer_state.json")


def test_an_untrained_save_is_the_same_bytes_on_both(workspace: Workspace, tmp_path: Path) -> None:
    """A rate of zero leaves the weights; both backends then write identical files."""
    for name in OTHER:
        require_framework(name)
        run(workspace, name, save=str(tmp_path / name), train_iters=1, lr=0.0, lr_warmup_iters=0, no_save_optim=True)
    files = [(tmp_path / name / "iter_0000001" / "mp_rank_00" / "model.safetensors").read_bytes() for name in OTHER]
    assert files[0] == files[1]


def test_the_log_line_is_megatrons(workspace: Workspace, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = run(workspace, framework, train_iters=4, log_interval=2, lr_warmup_iters=1)
    out = capsys.readouterr().out
    assert "> --save is not given: nothing will be saved" in out
    lines = LINE.findall(out)
    assert [(int(iteration), int(samples)) for iteration, samples, _, _ in lines] == [(1, 4), (2, 8), (4, 16)]
    assert float(lines[2][3]) == pytest.approx((records[2].loss + records[3].loss) / 2, rel=1e-6)
    assert float(lines[1][2]) == pytest.approx(records[2].lr, rel=1e-6)  # Megatron prints the next step's rate


def test_evaluation_is_the_token_mean_whatever_the_micro_batch(
    workspace: Workspace, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for micro_batch_size in (1, 4):
        run(
            workspace,
            framework,
            instructions=True,
            train_iters=2,
            lr_warmup_iters=0,
            split="80,20,0",
            eval_interval=2,
            eval_iters=100,
            micro_batch_size=micro_batch_size,
        )
        lines.append(re.findall(r"validation loss at iteration 2 \| lm loss value: (\S+)", capsys.readouterr().out))
    assert len(lines[0]) == 1
    assert float(lines[0][0]) == pytest.approx(float(lines[1][0]), rel=1e-5)


def test_recompute_and_bf16_on_cpu(workspace: Workspace, framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(workspace, framework, train_iters=4)
    recomputed = run(
        workspace,
        framework,
        train_iters=4,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=2,
    )
    assert losses(plain) == losses(recomputed)
    capsys.readouterr()
    run(workspace, framework, train_iters=1, lr_warmup_iters=0, bf16=True)
    notices = [line for line in capsys.readouterr().out.splitlines() if line.startswith("> bf16")]
    assert len(notices) <= 1  # none where the device computes bf16


def test_finetune_starts_again_and_no_load_optim_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    folder = str(tmp_path / "a")
    run(workspace, "torch", save=folder, train_iters=20, exit_interval=5)
    again = run(workspace, "torch", load=folder, finetune=True, train_iters=6)
    assert [record.iteration for record in again] == list(range(1, 7))
    kept = run(workspace, "torch", load=folder)
    fresh = run(workspace, "torch", load=folder, no_load_optim=True)
    assert [record.iteration for record in fresh] == list(range(6, 21))
    assert fresh[0].loss == kept[0].loss
    assert fresh[2].loss != kept[2].loss


def test_the_seed_of_the_data_order_is_resumed(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "a")
    unbroken = run(workspace, "torch", seed=5)
    run(workspace, "torch", save=folder, seed=5, exit_interval=10)
    capsys.readouterr()
    assert losses(run(workspace, "torch", load=folder, seed=6)) == losses(unbroken)[10:]
    assert "seed 5 from the checkpoint replaces --seed 6" in capsys.readouterr().out


def no_optimizer(workspace: Workspace, folder: Path) -> dict[str, object]:
    run(workspace, "torch", save=str(folder), exit_interval=2, no_save_optim=True)
    return {"load": str(folder)}


def damaged(workspace: Workspace, folder: Path) -> dict[str, object]:
    shutil.copytree(workspace.hf, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return {"load": str(folder)}


def changed(**values: object) -> object:
    return lambda workspace, folder: values


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (changed(load="/no/such/folder"), "/no/such/folder does not exist"),
        (lambda w, f: {"load": str(f.mkdir() or f)}, "latest_checkpointed_iteration"),
        (damaged, "truncated or damaged"),
        (no_optimizer, "--no-load-optim"),
        (changed(load=None), "--init random"),
        (changed(init="random"), "--load"),
        (changed(num_layers=9), "--num-layers 9 contradicts .* 2"),
        (changed(rotary_base=5.0), "--rotary-base 5.0 contradicts .* 10000.0"),
        (changed(untie_embeddings_and_output_weights=True), "--untie-embeddings"),
        (changed(seq_length=100_000), "max_position_embeddings 512"),
        (changed(tensor_model_parallel_size=2), "1 processes: expected a multiple of --tensor-model-parallel-size 2"),
        (changed(hidden_dropout=0.1), "hidden-dropout"),
        (changed(global_batch_size=3), "multiple"),
        (changed(data_path="/no/such/data"), "/no/such/data"),
        (changed(lr=None), "--lr is required"),
        (changed(ai_framework="tensorflow"), "tensorflow"),
        (changed(instructions=True, prompt_type="qwen4"), "qwen3"),
        (changed(instructions=True, prompt_type="qwen3", enable_thinking="true"), "enable_thinking"),
    ],
)
def test_bad_starts_end_before_the_first_step(
    workspace: Workspace, prepare: object, named: str, tmp_path: Path
) -> None:
    """An error that says what to do, and no step."""
    values = prepare(workspace, tmp_path / "x")  # type: ignore[operator]
    records: list[StepRecord] = []
    with pytest.raises(UserError, match=named):
        train(workspace.settings("torch", **{"load": str(workspace.hf), **values}), records.append)
    assert records == []


def test_random_weights_only_when_asked_and_equal_on_both(workspace: Workspace) -> None:
    for name in OTHER:
        require_framework(name)
    options = {"init": "random", "hf_cfg_dir": str(workspace.hf), "train_iters": 3, "lr_warmup_iters": 0}
    one, other = (run(workspace, name, **options) for name in OTHER)
    assert losses(one) == pytest.approx(losses(other), abs=1e-4)


def test_a_script_that_asks_for_torch_checkpoints_is_told(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, "torch", train_iters=1, lr_warmup_iters=0, save=str(tmp_path / "a"), ckpt_format="torch")
    assert "training saves native checkpoints" in capsys.readouterr().out
    run(workspace, "torch", train_iters=1, lr_warmup_iters=0, save=str(tmp_path / "b"))
    assert "training saves native checkpoints" not in capsys.readouterr().out


def test_yarns_flags_are_those_of_config_json(workspace: Workspace, tmp_path: Path) -> None:
    """MindSpeed-LLM's. What the error says to write makes the command run, on longer texts than before."""
    hf = shutil.copytree(workspace.hf, tmp_path / "hf")
    flags = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0, "beta_fast": 24.0}
    short = {**flags, "load": str(hf), "train_iters": 1, "lr_warmup_iters": 0, "seq_length": 600}
    with pytest.raises(UserError, match="needs --rope-scaling-original-max-position-embeddings"):
        run(workspace, "torch", **short)
    short["rope_scaling_original_max_position_embeddings"] = 256
    with pytest.raises(UserError, match=r"contradicts the weights' config, which has no rotary scaling: ") as error:
        run(workspace, "torch", **short)
    config = json.loads((hf / "config.json").read_text())
    written = json.loads("{" + str(error.value).partition("{")[2])
    config["rope_scaling"] = written
    config.setdefault("rope_parameters", {}).update(written)
    (hf / "config.json").write_text(json.dumps(config))
    saved = str(tmp_path / "run")
    assert len(run(workspace, "torch", **short, save=saved)) == 1
    assert open_source(Path(saved)).config.rotary_scaling == from_hf(config).rotary_scaling
    with pytest.raises(UserError, match="which has another rotary scaling"):
        run(workspace, "torch", **{**short, "rope_scaling_factor": 3.0})
    with pytest.raises(UserError, match="--beta-fast needs --rope-scaling-type yarn"):
        run(
            workspace,
            "torch",
            **{
                **short,
                "rope_scaling_type": None,
                "rope_scaling_factor": None,
                "rope_scaling_original_max_position_embeddings": None,
            },
        )
