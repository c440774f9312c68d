"""`--dry-run` finds what would stop a run, before anything is loaded, and says what would run."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.checkpoints.hf.source import HFSource
from tandem.config.settings import Settings
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.errors import UserError
from tandem.models.published import qwen3_config
from tandem.parallel.grid import Grid, held_shards
from tandem.parallel.layout import Layout
from tandem.training.run import train
from tandem.training.start.dry_run import dry_run, parameters_held
from workspace import Workspace, make_mixture

Usage = namedtuple("Usage", "total used free")


def test_a_good_run_is_described(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = workspace.settings(
        "torch", tensor_model_parallel_size=2, pipeline_model_parallel_size=2, global_batch_size=8, save=str(tmp_path)
    )
    dry_run(settings, 8)
    text = capsys.readouterr().out
    assert "8 processes: tensor 2 x pipeline 2 x data 2; a rank holds" in text
    assert "global batch 8 = 2 data ranks x 2 micro-batches x 2 samples" in text
    assert "20 steps over 160 samples" in text
    assert "nothing was trained" in text
    assert not list(tmp_path.iterdir())


def test_layers_that_do_not_divide_are_split_evenly(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(workspace.settings("torch", pipeline_model_parallel_size=3), 3)
    assert "4 layers over 3 stages: (1, 2, 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "processes", "expected"),
    [
        ({"tensor_model_parallel_size": 3}, 4, "4 processes: expected a multiple of --tensor-model-parallel-size 3"),
        (
            {"tensor_model_parallel_size": 8},
            8,
            "--tensor-model-parallel-size 8: .* num_query_groups 2 .* give 1 or 2",
        ),
        (
            {"pipeline_model_parallel_size": 7},
            7,
            "--pipeline-model-parallel-size 7: 4 layers .* do not divide over the stages: give 1, 2 or 4, or leave",
        ),
        ({"global_batch_size": 6}, 2, "--global-batch-size 6: expected multiples of --micro-batch-size 2 x 2"),
        ({"data_path": "/no/such/data"}, 1, "/no/such/data"),
        ({"save": "/dev/null/run"}, 1, "/dev/null is a file, where a folder is expected"),
        ({"num_layers_per_virtual_pipeline_stage": 2}, 1, "give --pipeline-model-parallel-size 2 or more"),
        ({"context_parallel_size": 2}, 2, "--context-parallel-size 2: only 1"),
    ],
)
def test_what_cannot_run_is_said(
    workspace: Workspace, values: dict[str, object], processes: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        dry_run(workspace.settings("torch", **values), processes)


def test_what_changes_nothing_or_is_not_saved_is_said(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = workspace.settings("torch", save=str(tmp_path), save_interval=None, spiky_loss_factor=5.0)
    dry_run(settings, 1)
    text = capsys.readouterr().out
    assert "--spiky-loss-factor 5: without effect; needs --check-for-spiky-loss" in text
    assert "--save-interval is not given: only the last step is saved" in text


@pytest.mark.parametrize(("interval", "is_said"), [(None, True), (3, True), (2, False)])
def test_only_what_is_saved_is_exported(
    interval: int | None,
    is_said: bool,
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dry_run(workspace.settings("torch", save=str(tmp_path), export_hf_every=4, save_interval=interval), 1)
    assert ("--export-hf-every 4: only what is saved is exported" in capsys.readouterr().out) == is_said


def changed_config(folder: Path, target: Path, **values: object) -> Path:
    """A copy of the config.json of a model, with other values."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


def test_a_config_json_that_the_weights_do_not_need_must_agree(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = changed_config(workspace.hf, tmp_path / "same")
    dry_run(workspace.settings("torch", hf_cfg_dir=str(same)), 1)
    longer = changed_config(workspace.hf, tmp_path / "longer", max_position_embeddings=10**6, initializer_range=0.5)
    dry_run(workspace.settings("torch", hf_cfg_dir=str(longer)), 1)
    other = changed_config(workspace.hf, tmp_path / "other", num_key_value_heads=4)
    with pytest.raises(UserError, match=r"--hf-cfg-dir .*other describes another model.*num_query_groups 2, not 4"):
        dry_run(workspace.settings("torch", hf_cfg_dir=str(other)), 1)


def test_samples_longer_than_the_model_was_made_for_are_said(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    most = HFSource(workspace.hf).config.max_position_embeddings
    with pytest.raises(UserError, match=f"--seq-length {2 * most} is above max_position_embeddings {most}"):
        dry_run(workspace.settings("torch", seq_length=2 * most), 1)
    dry_run(workspace.settings("torch", seq_length=2 * most, max_position_embeddings=2 * most), 1)
    assert f"more than the {most} that the weights' config allows" in capsys.readouterr().out


def test_what_a_framework_does_not_do_is_said_before_a_device_is_needed(workspace: Workspace) -> None:
    require_framework("mindspore")
    with pytest.raises(UserError, match="not mindspore: leave it out, or use --ai-framework torch"):
        dry_run(workspace.settings("mindspore", use_torch_fsdp2=True), 2)


def test_interleaved_stages_can_start(workspace: Workspace, framework: str) -> None:
    stages = {"num_layers_per_virtual_pipeline_stage": 1, "pipeline_model_parallel_size": 2}
    dry_run(workspace.settings(framework, **stages), 2)


def test_each_rank_holds_what_the_layout_gives_it() -> None:
    config = qwen3_config("30B-A3B")
    for layout, processes in (
        (Layout(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1), 4),
        (Layout(tensor_model_parallel_size=2, expert_model_parallel_size=4, expert_tensor_parallel_size=1), 8),
        (Layout(pipeline_model_parallel_size=2, expert_model_parallel_size=2, moe_tp_extend_ep=True), 8),
    ):
        grid = Grid(layout, processes)
        held = [held_shards(config, grid, grid.place(rank)) for rank in range(processes)]
        assert parameters_held(config, grid) == [sum(math.prod(shard.shape) for shard in of_rank) for of_rank in held]


def test_a_disk_too_small_for_one_checkpoint_is_said(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="the disk has 0 MB free"):
        dry_run(workspace.settings("torch", save=str(tmp_path)), 1)


def test_data_of_another_kind_are_said(workspace: Workspace) -> None:
    text, chat = f"{workspace.text}_text_document", str(workspace.instructions)
    for values, expected in (
        ({"data_path": chat}, "these data are conversations, for `tandem finetune`"),
        ({"data_path": text, "is_instruction_dataset": True}, "these data are plain text, for `tandem pretrain`"),
    ):
        with pytest.raises(UserError, match=expected):
            dry_run(workspace.settings("torch", **values), 1)


def test_raw_data_are_tried_and_left_alone(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.jsonl"
    shutil.copy(workspace.corpus, raw)
    settings = workspace.settings("torch", data_path=str(raw), train_iters=None, epochs=2)
    dry_run(settings, 1)
    text = capsys.readouterr().out
    rows = len(raw.read_text().splitlines())
    assert f"{raw} is raw and is preprocessed before training; of the first {rows} documents {rows} are kept" in text
    assert "nothing was trained" in text
    assert list(tmp_path.iterdir()) == [raw]
    epochs = {"train_iters": None, "epochs": 2}
    for values in (
        {"data_path": [str(raw), "/no/such"]},
        {"data_path": [str(raw)], "valid_data_path": ["x=/no/such"]},
        {"data_path": ["/no/such"], **epochs},
    ):
        with pytest.raises(UserError, match=r"/no/such\.idx: no such file"):
            dry_run(workspace.settings("torch", **values), 1)
    twice = workspace.settings("torch", data_path=[str(raw), str(raw)])
    with pytest.raises(UserError, match="a prefix is named twice"):
        dry_run(twice, 1)
    thinking = tmp_path / "thinking"
    preprocess(
        PreprocessOptions(
            (str(workspace.questions),), str(thinking), str(workspace.hf), prompt_type="qwen3", enable_thinking="true"
        )
    )
    data_path = [str(workspace.questions), str(thinking)]
    with pytest.raises(UserError, match="different templates"):
        dry_run(workspace.settings("torch", instructions=True, data_path=data_path, prompt_type="qwen3"), 1)
    weighted = workspace.settings("torch", data_path=["1", str(raw), "2", str(workspace.corpus)], **epochs)
    with pytest.raises(UserError, match="--epochs 2 takes every sample equally often, but the weights"):
        dry_run(weighted, 1)
    raw.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"raw\.jsonl:2: "):
        dry_run(settings, 1)


def test_a_folder_that_cannot_be_written_is_said(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # as root, nothing else refuses
    with pytest.raises(UserError, match="cannot be written to: choose another folder"):
        dry_run(workspace.settings("torch", save=str(tmp_path / "run")), 1)


def test_what_an_engine_refuses_is_said(workspace: Workspace, tmp_path: Path) -> None:
    experts = {"load": str(make_mixture(workspace.hf, tmp_path / "moe"))}
    pooled = {"moe_router_load_balancing_type": "pooled_aux_loss", "moe_aux_loss_coeff": 0.01}
    for values, expected in (
        ({**experts, **pooled, "pipeline_model_parallel_size": 2}, "needs all layers on one pipeline stage"),
        ({**experts, "expert_model_parallel_size": 2, "use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"device": "gpu"}, "--device gpu: torch computes on npu, cuda, cpu: give one of them$"),
    ):
        with pytest.raises(UserError, match=expected):
            dry_run(workspace.settings("torch", **values), 2)


def test_a_device_of_the_other_framework_is_said(workspace: Workspace) -> None:
    require_framework("mindspore")
    with pytest.raises(UserError, match="computes on npu, cpu: give one of them, or --ai-framework torch"):
        dry_run(workspace.settings("mindspore", device="cuda"), 1)


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one step: `plain`, `bare` without an optimizer, and `adapters`, whose weights are in `weights`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(workspace.hf, folder / "weights")
    for name, values in (
        ("plain", {}),
        ("bare", {"no_save_optim": True}),
        ("adapters", {"lora_target_modules": "all-linear", "load": str(folder / "weights")}),
    ):
        train(workspace.settings("torch", train_iters=1, lr_warmup_iters=0, save=str(folder / name), **values))
    return folder


def refused_by_both(settings: Settings) -> str:
    """What a dry run says, which the run itself must say, too."""
    texts = []
    for start in (lambda: dry_run(settings, 1), lambda: train(settings)):
        with pytest.raises(UserError) as refusal:
            start()
        texts.append(str(refusal.value))
    assert texts[0] == texts[1]
    return texts[0]


def test_what_stops_a_run_after_its_processes_have_met_is_said(workspace: Workspace, trained: Path) -> None:
    text = refused_by_both(workspace.settings("torch", load=str(trained / "bare")))
    assert "contains no optimizer" in text
    weights = trained / "weights" / "model.safetensors"
    values = {"load": str(trained / "adapters"), "lr_warmup_iters": 0}
    dry_run(workspace.settings("torch", **values), 1)
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        assert "are others" in refused_by_both(workspace.settings("torch", **values))
    finally:
        weights.write_bytes(before)


def test_another_reference_is_said(workspace: Workspace, trained: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": row["instruction"], "input": "", "chosen": row["output"], "rejected": row["output"][:1] + "07"}
        for row in json.loads(workspace.questions.read_text(encoding="utf-8"))[:8]
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    preprocess(
        PreprocessOptions(
            (str(tmp_path / "pairs.json"),), str(tmp_path / "data"), str(workspace.hf), prompt_type="qwen3"
        )
    )
    values = {"stage": "dpo", "instructions": True, "seq_length": 96, "lr_warmup_iters": 0}
    values |= {"data_path": str(tmp_path / "data"), "save": str(tmp_path / "run")}
    train(workspace.settings("torch", train_iters=1, **values))
    dry_run(workspace.settings("torch", train_iters=2, ref_model=str(workspace.hf), **values), 1)
    text = refused_by_both(workspace.settings("torch", train_iters=2, ref_model=str(trained / "plain"), **values))
    assert "is compared with other weights" in text


def test_a_logger_that_cannot_start_is_said(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    for flag, values in (
        ("--tensorboard-dir", {"tensorboard_dir": str(file)}),
        ("--profile-save-path", {"profile_save_path": str(file), "profile": True}),
    ):
        text = refused_by_both(workspace.settings("torch", **values))
        assert text.startswith(f"{flag} {file}: {file} is a file")
    without_login = {"WANDB_MODE": "online", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    for name, value in without_login.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'tandem-llm[wandb]'")
    settings = workspace.settings("torch", wandb_project="p")
    assert "--wandb-project p: No API key" in refused_by_both(settings)
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    dry_run(settings, 1)
    wandb.teardown()


@pytest.mark.parametrize(
    ("package", "values"), [("tensorboard", {"tensorboard_dir": "x"}), ("wandb", {"wandb_project": "p"})]
)
def test_a_missing_logger_is_said(
    workspace: Workspace, package: str, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install 'tandem-llm[{package}]'" in refused_by_both(workspace.settings("torch", **values))


def test_a_run_that_goes_on_is_described_as_it_describes_itself(
    workspace: Workspace, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, run = str(trained / "plain"), str(shutil.copytree(trained / "plain", tmp_path / "run"))
    steps = {"lr_warmup_iters": 0}
    for values, expected in (
        (
            {"save": run, "train_iters": 1, "dry_run": True},
            ["nothing is left to train", "resuming at iteration 1, 4 samples consumed"],
        ),
        (
            {"save": run, "train_iters": 2, "lr": 9e-3},
            ["resuming at iteration 1", "the learning rate of the next step is", "setting", "lr ", "train_iters"],
        ),
        (
            {"load": plain, "instructions": True, "train_iters": 2, "ckpt_format": "torch", "save": f"{run}2"},
            ["--ckpt-format torch: training saves native", "resuming", "the checkpoint is of training on plain text"],
        ),
    ):
        settings = workspace.settings("torch", **steps, **values)
        dry_run(settings, 1)
        said = capsys.readouterr().out.splitlines()
        train(settings)
        banner = [line for line in capsys.readouterr().out.splitlines() if line.startswith("> ")]
        shared = [line for line in said if line in banner]
        for text in expected:
            assert [line for line in shared if line.startswith(f"> {text}")], text
        at_once = expected[0].startswith("nothing")
        assert not [line for line in said if "dry_run" in line]
        assert ("the run would end at once" in said[-1], "all of this can start" in said[-1]) == (at_once, not at_once)


def test_an_optimizer_that_is_not_read_is_said(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HFSource, "unread_optimizer", lambda _: ("optimizer.pt",))
    dry_run(workspace.settings("torch"), 1)
    assert "(optimizer.pt) is not read: this run starts at iteration 0" in capsys.readouterr().out


def test_raw_data_have_steps_a_disk_and_a_prompt_type(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shutil.copy(workspace.questions, tmp_path / "questions.json")
    values = {"instructions": True, "data_path": str(raw), "lr_warmup_iters": 0}
    values |= {"train_iters": 3, "save_interval": 1, "save": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 25_000_000))
        dry_run(workspace.settings("torch", **values), 1)
    text = capsys.readouterr().out
    assert "3 steps over 12 samples" in text
    assert "and the disk has 0.03 GB free: it is full after" in text
    assert "written with --prompt-type chat_template" in text
    dry_run(workspace.settings("torch", **{**values, "train_iters": None, "epochs": 2}), 1)
    assert "--epochs 2: the number of steps is known when the data are preprocessed" in capsys.readouterr().out

    train(workspace.settings("torch", **values))
    capsys.readouterr()
    dry_run(workspace.settings("torch", **{**values, "train_iters": None, "epochs": 2}), 1)
    text = capsys.readouterr().out
    assert "is raw and was preprocessed before, into" in text
    assert "(2.00 epochs)" in text
    assert "resuming at iteration 3" in text
    assert "data_path" not in text  # the table of changes
    rows = json.loads(raw.read_text(encoding="utf-8"))
    raw.write_text(json.dumps(rows[1:]), encoding="utf-8")
    settings = workspace.settings("torch", **{**values, "train_iters": 4})
    assert "since its raw data, or the flags for reading them, have changed" in refused_by_both(settings)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"num_layers": 28, "hidden_size": 5, "seq_length": 9999, "num_experts": 2, "tensor_model_parallel_size": 8},
            [
                "--num-layers 28",
                "--hidden-size 5",
                "--seq-length 9999",
                "--num-experts 2",
                "--tensor-model-parallel-size 8",
            ],
        ),
        (
            {"lr": None, "data_path": "/no/such", "global_batch_size": 12, "save": "/dev/null", "num_layers": 7},
            ["--lr is required", "/no/such.idx", "--global-batch-size 12", "--save /dev/null", "--num-layers 7"],
        ),
        (
            {"lr": None, "load": None, "init": None},
            ["give either --load", "--lr is required", "--global-batch-size 4"],
        ),
        (
            {"lora_target_modules": "all-linear", "lora_r": 0, "tensorboard_dir": "/dev/null"},
            ["--global-batch-size 4", "--tensorboard-dir /dev/null", "--lora-r 0"],
        ),
        ({"global_batch_size": 3}, ["--global-batch-size 3"]),
    ],
)
def test_everything_wrong_is_said_at_once(workspace: Workspace, values: dict[str, object], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        dry_run(workspace.settings("torch", **values), 8)
    assert len(error.value.problems) == len(expected)
    for problem, start in zip(error.value.problems, expected, strict=True):
        assert problem.startswith(start)
