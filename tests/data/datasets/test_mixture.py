"""Resuming with other weights, sources or lengths: every source goes on where it was left."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from runs import open_data
from tandem.checkpoints.detect import open_source
from tandem.config.settings import Settings
from tandem.data.datasets.blend import BlendedDataset
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.training.run import train
from tandem.training.start.data import Data
from tandem.training.start.state import TrainerState
from workspace import Workspace

BATCH = 4


@pytest.fixture(scope="module")
def second(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same text as `workspace.text`, without end-of-document tokens, under a name of its own."""
    prefix = tmp_path_factory.mktemp("second") / "text"
    preprocess(PreprocessOptions((str(workspace.corpus),), str(prefix), str(workspace.hf)))
    return f"{prefix}_text_document"


def settings_for(workspace: Workspace, data_path: list[str], iters: int = 10, **values: object) -> Settings:
    return workspace.settings("torch", data_path=data_path, train_iters=iters, **{"global_batch_size": BATCH, **values})


def after(data: Data, settings: Settings, iterations: int) -> TrainerState:
    """What a checkpoint says after some iterations, as it comes back from the disk."""
    state = TrainerState(iterations, iterations * BATCH, iterations, settings.training.seed, data.identity)
    return TrainerState(**json.loads(state.to_json()))


def taken(data: Data, number: int, upto: int | None = None) -> list[int]:
    """Which samples of a source are taken, in order."""
    assert isinstance(data.train, BlendedDataset)
    is_taken = data.train.dataset_index[:upto] == number
    return list(data.train.dataset_sample_index[:upto][is_taken].tolist())


def tokens(data: Data, begin: int, end: int) -> list[bytes]:
    return [data.train[i].tokens.tobytes() for i in range(begin, end)]


def test_changed_weights_go_on_from_each_sources_own_cursor(workspace: Workspace, second: str) -> None:
    first, tokenizer = f"{workspace.text}_text_document", Tokenizer(workspace.hf)
    before = settings_for(workspace, ["0.5", first, "0.5", second])
    old = open_data(before, tokenizer)
    state = after(old, before, 5)
    new = open_data(settings_for(workspace, ["0.9", first, "0.1", second]), tokenizer, state)
    assert tokens(new, 0, 20) == tokens(old, 0, 20)
    for number, share in ((0, 10 + 18), (1, 10 + 2)):
        assert taken(new, number) == list(range(share))  # none twice, none left out
    assert isinstance(new.train, BlendedDataset)
    assert "weight 0.9," in new.notices[0]

    again = after(new, before, 7)
    for weights in (["0.9", first, "0.1", second], ["9", first, "1", second]):
        same = open_data(settings_for(workspace, weights), tokenizer, again)
        assert tokens(same, 0, 40) == tokens(new, 0, 40)
    assert json.loads(again.to_json())["data"]["mixture"]["segments"][1]["begin"] == 20


def test_sources_come_and_go(workspace: Workspace, second: str, tmp_path: Path) -> None:
    first, tokenizer = f"{workspace.text}_text_document", Tokenizer(workspace.hf)
    alone = settings_for(workspace, [first])
    old = open_data(alone, tokenizer)
    both = settings_for(workspace, ["0.5", first, "0.5", second])
    new = open_data(both, tokenizer, after(old, alone, 4))
    assert tokens(new, 0, 16) == tokens(old, 0, 16)
    assert (taken(new, 0), taken(new, 1)) == (list(range(16 + 12)), list(range(12)))
    only_second = open_data(settings_for(workspace, [second]), tokenizer, after(new, both, 6))
    assert taken(only_second, 1) == list(range(4 + 16))
    assert "no longer used" in only_second.notices[0]


def test_a_run_that_is_over_already(workspace: Workspace, second: str) -> None:
    first, tokenizer = f"{workspace.text}_text_document", Tokenizer(workspace.hf)
    long = settings_for(workspace, ["1", first, "1", second])
    state = after(open_data(long, tokenizer), long, 8)
    assert len(open_data(settings_for(workspace, ["1", first, "2", second], iters=5), tokenizer, state).train) == 32


def test_a_longer_run_finishes_the_order_it_began(workspace: Workspace) -> None:
    """Megatron's order depends on the length of the run; what a run began is kept, and more follows."""
    path, tokenizer = [f"{workspace.text}_text_document"], Tokenizer(workspace.hf)
    short = settings_for(workspace, path, iters=10)
    old = open_data(short, tokenizer)
    longer = open_data(settings_for(workspace, path, iters=400), tokenizer, after(old, short, 10))
    assert tokens(longer, 0, 40) == tokens(old, 0, 40)
    assert tokens(longer, 0, 40) != tokens(open_data(settings_for(workspace, path, iters=400), tokenizer), 0, 40)
    assert len(longer.train) >= 1600
    again = open_data(settings_for(workspace, path, iters=400), tokenizer, after(longer, short, 50))
    assert tokens(again, 300, 320) == tokens(longer, 300, 320)


@pytest.mark.parametrize("pack", [False, True])
def test_a_longer_fine_tuning_is_the_unbroken_one(workspace: Workspace, pack: bool) -> None:
    path, tokenizer = [str(workspace.instructions)], Tokenizer(workspace.hf)
    values = {"instructions": True, "pack": pack, "seq_length": 64}
    short, long = (settings_for(workspace, path, iters=iters, **values) for iters in (10, 200))
    old = open_data(short, tokenizer)
    resumed = open_data(long, tokenizer, after(old, short, 10))
    assert tokens(resumed, 0, 800) == tokens(open_data(long, tokenizer), 0, 800)


def test_another_order_begins_where_the_samples_are_others(workspace: Workspace) -> None:
    path, tokenizer = [f"{workspace.text}_text_document"], Tokenizer(workspace.hf)
    short = settings_for(workspace, path)
    state = after(open_data(short, tokenizer), short, 5)
    other = settings_for(workspace, path, iters=300, seq_length=16)
    assert tokens(open_data(other, tokenizer, state), 0, 9) == tokens(open_data(other, tokenizer), 0, 9)
    with pytest.raises(UserError, match="a prefix is named twice"):
        open_data(settings_for(workspace, path * 2), tokenizer)


def test_a_resumed_run_keeps_its_mixture(workspace: Workspace, second: str, tmp_path: Path) -> None:
    first = f"{workspace.text}_text_document"
    save = {"save": str(tmp_path / "run"), "save_interval": 2}
    train(settings_for(workspace, ["1", first, "1", second], iters=4, **save))
    trainer = train(settings_for(workspace, ["3", first, "1", second], iters=6, **{**save, "load": save["save"]}))
    data = trainer.train_data
    assert isinstance(data, BlendedDataset)
    assert data.counts() == [8 + 6, 8 + 2]
    state = json.loads((tmp_path / "run/iter_0000006/trainer_state.json").read_text())
    assert [segment["begin"] for segment in state["data"]["mixture"]["segments"]] == [0, 16]


def test_a_smaller_batch_has_samples_to_its_end(workspace: Workspace, second: str, tmp_path: Path) -> None:
    """What is left is counted from where the run stands: 5 steps of 16, then 15 of 4."""
    data_path = ["0.5", f"{workspace.text}_text_document", "0.5", second]
    save = str(tmp_path / "run")
    train(settings_for(workspace, data_path, 20, save=save, global_batch_size=16, exit_interval=5))
    trainer = train(settings_for(workspace, data_path, 20, save=save))
    assert (trainer.progress.iteration, trainer.progress.consumed_train_samples) == (20, 5 * 16 + 15 * 4)


def test_a_run_in_samples_has_as_many_with_another_batch(workspace: Workspace, tmp_path: Path) -> None:
    data_path, save = [f"{workspace.text}_text_document"], str(tmp_path / "run")
    values = {"train_iters": None, "train_samples": 96, "save": save, "lr_warmup_iters": 0}
    train(workspace.settings("torch", data_path=data_path, **values, global_batch_size=4, exit_interval=12))
    trainer = train(workspace.settings("torch", data_path=data_path, **values, global_batch_size=8))
    assert (trainer.progress.iteration, trainer.progress.consumed_train_samples) == (12 + 6, 96)
    assert trainer.schedule.lr(96) == trainer.schedule.min_lr


def test_epochs_are_not_counted_in_steps_of_another_size(workspace: Workspace, tmp_path: Path) -> None:
    values = {"train_iters": None, "epochs": 1, "instructions": True, "save": str(tmp_path / "run")}
    train(workspace.settings("torch", **values, global_batch_size=4, exit_interval=2))
    with pytest.raises(UserError, match=r"steps .* took 4 samples so far, .* keep 4, or give ") as caught:
        train(workspace.settings("torch", **values, global_batch_size=8))
    (samples,) = re.findall(r"--train-samples (\d+)", str(caught.value))
    instead = {**values, "epochs": None, "train_samples": int(samples)}
    settings = workspace.settings("torch", **instead, global_batch_size=8, lr_warmup_iters=0, exit_interval=3)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    checkpoint = dataclasses.replace(settings.checkpoint, save=str(tmp_path / "other"))
    assert train(dataclasses.replace(settings, checkpoint=checkpoint)).progress.iteration == 3
    assert train(workspace.settings("torch", **values, global_batch_size=4, exit_interval=3)).progress.iteration == 3


def test_a_new_order_is_a_notice(workspace: Workspace) -> None:
    tokenizer = Tokenizer(workspace.hf)
    before = workspace.settings("torch", instructions=True, seq_length=128)
    state = after(open_data(before, tokenizer), before, 2)
    assert not open_data(before, tokenizer, state).notices
    packed = workspace.settings("torch", instructions=True, seq_length=128, pack=True, no_shuffle=True, seed=5)
    (notice,) = open_data(packed, tokenizer, state).notices
    assert "another pack, no shuffle, seed: the samples get a new order, from the same position" in notice
    old = dataclasses.replace(state, data={key: value for key, value in state.data.items() if key != "no_shuffle"})
    kept = workspace.settings("torch", instructions=True, seq_length=128, no_shuffle=True)
    assert not open_data(kept, tokenizer, old).notices
    text = workspace.settings("torch")
    began = after(open_data(text, tokenizer), text, 2)
    (notice,) = open_data(workspace.settings("torch", no_shuffle=True), tokenizer, began).notices
    assert notice == "--no-shuffle: without effect on plain text"  # which keeps its order


def test_a_path_in_another_spelling_is_the_same_source(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.text.parent)
    name = f"{workspace.text.name}_text_document"
    short, save = {"lr_warmup_iters": 0}, {"save": str(tmp_path / "run")}
    train(settings_for(workspace, [f".//{name}"], 2, **short, **save))
    again = train(settings_for(workspace, [name], 3, **short, **save))
    whole = train(settings_for(workspace, [name], 3, **short))
    assert [again.train_data.origin(i) for i in range(12)] == [whole.train_data.origin(i) for i in range(12)]
    state = TrainerState.from_source(open_source(save["save"], None))
    assert state is not None
    assert state.data["mixture"]["prefixes"] == [name]


def test_a_run_with_nothing_left_to_train_says_so(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(
        workspace, [f"{workspace.text}_text_document"], 2, lr_warmup_iters=0, save=str(tmp_path / "run")
    )
    train(settings)
    assert "nothing is left to train" not in capsys.readouterr().out
    train(settings)
    assert "nothing is left to train: the weights are from iteration 2 of 2" in capsys.readouterr().out
    few = dataclasses.replace(settings.training, train_iters=None, train_samples=BATCH - 1)
    with pytest.raises(UserError, match="--train-samples 3: expected at least 4"):
        train(dataclasses.replace(settings, training=few))


def test_a_source_that_a_run_goes_on_with_counts_its_epochs(workspace: Workspace) -> None:
    path, tokenizer = [f"{workspace.text}_text_document"], Tokenizer(workspace.hf)
    before = settings_for(workspace, path, 3)
    data = open_data(settings_for(workspace, path, 300), tokenizer, after(open_data(before, tokenizer), before, 3))
    counts = data.train.describe()
    assert counts["samples"] >= 300 * BATCH
    assert counts["epochs"] == -(-counts["samples"] // counts["samples_per_epoch"])
