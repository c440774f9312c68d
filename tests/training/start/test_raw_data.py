"""Raw files as --data-path: preprocessed once, found again, by one process of a machine."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from runs import open_data, with_epochs, with_preprocessed
from tandem.config.settings import Settings
from tandem.data.indexed import IndexedDataset
from tandem.data.preprocess.cache import is_raw, preprocess_once
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.lock import BusyError
from tandem.launch.world import World
from tandem.training.run import train
from tandem.training.start import raw_data
from tandem.training.start.dry_run import dry_run
from tandem.training.start.prepare import prepare
from workspace import Workspace


def settings_for(workspace: Workspace, raw: object, cache: Path, **values: object) -> Settings:
    return workspace.settings("torch", data_path=str(raw), data_cache_path=str(cache), **values)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No preprocessing may happen."""
    monkeypatch.setattr("tandem.data.preprocess.cache.preprocess", lambda *_: 1 / 0)


def test_raw_text_is_preprocessed_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = settings_for(workspace, workspace.corpus, tmp_path, append_eod=True)
    ready = with_preprocessed(raw)
    assert "preprocessing" in capsys.readouterr().out
    (prefix,) = ready.data.data_path
    by_hand = Path(f"{workspace.text}_text_document.bin").read_bytes()
    assert Path(f"{prefix}.bin").read_bytes() == by_hand
    assert raw_data.with_preprocessed(ready.data, Tokenizer(workspace.hf)) is ready.data
    assert len(open_data(ready, Tokenizer(workspace.hf)).train) > 0
    monkeypatch.setattr("tandem.data.preprocess.cache.preprocess", lambda *_: 1 / 0)
    os.utime(workspace.corpus)  # the bytes count, not the time
    assert with_preprocessed(raw) == ready
    assert with_preprocessed(raw, leader=False) == ready
    for change in ({"append_eod": False}, {"tokenizer_name_or_path": str(tmp_path)}):
        other = dataclasses.replace(raw, data=dataclasses.replace(raw.data, **change))
        with pytest.raises((ZeroDivisionError, UserError)):
            with_preprocessed(other)


def test_raw_conversations_with_epochs_and_packing(workspace: Workspace, tmp_path: Path) -> None:
    values = {"instructions": True, "train_iters": None, "epochs": 1, "pack": True, "seq_length": 128}
    raw = settings_for(workspace, workspace.questions, tmp_path, prompt_type="qwen3", **values)
    ready = with_epochs(with_preprocessed(raw))
    assert open_data(ready, Tokenizer(workspace.hf)).template["prompt_type"] == "qwen3"  # type: ignore[index]
    own = with_epochs(with_preprocessed(settings_for(workspace, workspace.questions, tmp_path, **values)))
    assert open_data(own, Tokenizer(workspace.hf)).template["prompt_type"] == "chat_template"  # type: ignore[index]
    bare = shutil.copytree(workspace.hf, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": None}))
    with pytest.raises(UserError, match="needs --prompt-type"):
        with_preprocessed(
            settings_for(workspace, workspace.questions, tmp_path, tokenizer_name_or_path=str(bare), **values)
        )


def talk(*texts: str, **more: object) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return json.dumps({"messages": messages, **more}) + "\n"


def test_raw_conversations_take_the_options_of_preprocessing(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "x.jsonl"
    long = talk("1", "one " * 64)
    raw.write_text(talk("1", "one", "2", "two") * 9 + long + "no JSON\n" + talk("1", "one", system="S"))
    values = {"instructions": True, "prompt_type": "qwen3", "seq_length": 64, "on_bad": "skip"}
    sizes = {}
    for name, change in {
        "all": {},
        "last": {"train_turns": "last"},
        "short": {"over_long": "drop"},
        "end": {"append_eod": True, "eod_token": "<|endoftext|>"},
    }.items():
        (prefix,) = with_preprocessed(settings_for(workspace, raw, tmp_path, **values, **change)).data.data_path
        record = json.loads(Path(f"{prefix}.json").read_text())
        sizes[name] = (record["counts"]["kept"], record["counts"]["trained_tokens"])
        assert record["counts"]["rejected"] == 1
    assert "not read: system" in capsys.readouterr().out
    assert sizes["last"][0] == sizes["all"][0] == sizes["short"][0] + 1 == 11
    assert sizes["last"][1] < sizes["all"][1] < sizes["end"][1]
    with pytest.raises(UserError, match=r"x\.jsonl:10: .* tokens, but --seq-length allows 64"):
        with_preprocessed(settings_for(workspace, raw, tmp_path, **values, over_long="stop"))
    with pytest.raises(UserError, match=r"x\.jsonl:11: not valid JSON"):
        with_preprocessed(settings_for(workspace, raw, tmp_path, **{**values, "on_bad": "stop"}))


def test_a_dry_run_names_the_handler_and_what_it_does_not_read(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "x.jsonl"
    raw.write_text(json.dumps({"instruction": "I", "output": "O", "history": [["a", "b"]], "images": ["x.png"]}) + "\n")
    dry_run(
        settings_for(
            workspace, raw, tmp_path, instructions=True, prompt_type="qwen3", train_iters=1, lr_warmup_iters=0
        ),
        1,
    )
    out = capsys.readouterr().out
    assert "read with AlpacaStyleInstructionHandler" in out
    assert "not read: history, images" in out
    assert """--map-keys '{"history": "history"}' reads history""" in out
    assert "images: only texts are trained on" in out


def test_flags_for_raw_files_are_named_where_the_data_are_ready(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(workspace, workspace.instructions, tmp_path, instructions=True, train_turns="last")
    assert with_preprocessed(settings) == settings
    assert "--train-turns: for raw files" in capsys.readouterr().out


def test_what_is_raw(workspace: Workspace, tmp_path: Path) -> None:
    assert is_raw(str(workspace.corpus))
    assert is_raw(str(workspace.root))
    assert is_raw(f"{workspace.root}/*.jsonl") or is_raw(f"{workspace.root}/*.json")
    for prefix in (f"{workspace.text}_text_document", str(workspace.instructions), str(tmp_path / "absent"), "0.3"):
        assert not is_raw(prefix)


@pytest.mark.parametrize(("pattern", "folder"), [("{}/*/x.jsonl", ""), ("{}/a/x.json*", "a"), ("{}/**/[x].jsonl", "")])
def test_what_a_pattern_becomes_lies_where_the_pattern_begins(
    workspace: Workspace, tmp_path: Path, pattern: str, folder: str
) -> None:
    (tmp_path / "a").mkdir()
    shutil.copyfile(workspace.corpus, tmp_path / "a" / "x.jsonl")
    ready = with_preprocessed(workspace.settings("torch", data_path=[pattern.format(tmp_path)]))
    assert Path(ready.data.data_path[0]).parent.parent.parent == tmp_path / folder


def test_raw_validation_sets(workspace: Workspace, tmp_path: Path) -> None:
    ready = f"{workspace.text}_text_document"
    folder = tmp_path / "split=valid"
    folder.mkdir()
    shutil.copyfile(workspace.corpus, folder / "x.jsonl")
    for words in ([str(workspace.corpus)], [str(folder / "x.jsonl")], [f"a={workspace.corpus}", f"b={ready}"]):
        raw = workspace.settings(
            "torch", valid_data_path=words, data_cache_path=str(tmp_path), eval_iters=1, eval_interval=1
        )
        prepared = with_preprocessed(raw)
        assert prepared.data.data_path == raw.data.data_path
        prefix = prepared.data.valid_data_path[0].removeprefix("a=")
        assert IndexedDataset(prefix).num_documents == IndexedDataset(ready).num_documents
        assert prepared.data.valid_data_path[1:] == raw.data.valid_data_path[1:]
        assert list(open_data(prepared, Tokenizer(workspace.hf)).valid)[1:] == ["b"][: len(words) - 1]


def test_a_blend_of_raw_and_ready(workspace: Workspace, tmp_path: Path) -> None:
    data_path = ["0.3", str(workspace.corpus), "0.7", f"{workspace.text}_text_document"]
    raw = workspace.settings("torch", data_path=data_path, data_cache_path=str(tmp_path))
    ready = with_preprocessed(raw)
    assert [ready.data.data_path[i] for i in (0, 2, 3)] == [data_path[i] for i in (0, 2, 3)]
    assert IndexedDataset(ready.data.data_path[1]).num_documents > 0


def test_the_others_wait_for_the_leader(workspace: Workspace, tmp_path: Path) -> None:
    raw = settings_for(workspace, workspace.corpus, tmp_path)
    waiting = multiprocessing.get_context("fork").Process(target=with_preprocessed, args=(raw, False))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()
    with_preprocessed(raw)
    waiting.join(20)
    assert waiting.exitcode == 0

    with pytest.raises(UserError, match="did not write this record"):
        with_preprocessed(settings_for(workspace, workspace.questions.parent, tmp_path), False, wait=lambda _: None)


def test_a_second_job_waits_for_the_first(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = settings_for(workspace, workspace.corpus, tmp_path)
    real = preprocess_once.__globals__["preprocess"]

    def busy(*_: object) -> None:
        raise BusyError("another process is writing")

    monkeypatch.setattr("tandem.data.preprocess.cache.preprocess", busy)
    waited: list[Path] = []

    def first_job_finishes(record: Path) -> None:
        waited.append(record)
        monkeypatch.setattr("tandem.data.preprocess.cache.preprocess", real)
        with_preprocessed(raw)

    with_preprocessed(raw, wait=first_job_finishes)
    assert len(waited) == 1


def test_errors(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"--data-cache-path .*: \S+ is a file, where a folder is expected"):
        with_preprocessed(settings_for(workspace, workspace.corpus, file))
    with pytest.raises(UserError, match="--json-keys a b: expected one field"):
        with_preprocessed(settings_for(workspace, workspace.corpus, tmp_path, json_keys=["a", "b"]))
    with pytest.raises(UserError, match="needs --tokenizer-name-or-path"):
        with_preprocessed(settings_for(workspace, workspace.corpus, tmp_path, init="random"))


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("values", "processes", "expected"),
    [
        ({"valid_data_path": ["/no/such"]}, 1, "/no/such.idx: no such file"),
        ({"valid_data_path": ["/no/such", "b=/no/other"]}, 1, "--valid-data-path /no/such: expected NAME=PREFIX"),
        ({"lr": None}, 1, "--lr is required"),
        ({"train_iters": None, "epochs": 1, "train_samples": 8}, 1, "--epochs 1.0 exclude each other"),
        ({"tensor_model_parallel_size": 3}, 4, "4 processes: expected a multiple"),
        (
            {"tensor_model_parallel_size": 8},
            8,
            "--tensor-model-parallel-size 8: .* num_query_groups 2 .* give 1 or 2",
        ),
        ({"num_layers": 7}, 1, "--num-layers 7 contradicts"),
        ({"load": "/no/such/folder"}, 1, "/no/such/folder does not exist"),
    ],
)
def test_what_cannot_run_is_known_before_anything_is_preprocessed(
    workspace: Workspace, tmp_path: Path, values: dict[str, object], processes: int, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        prepare(settings_for(workspace, workspace.corpus, tmp_path, **values), World(size=processes))


@pytest.mark.parametrize(
    ("instructions", "values", "message"),
    [
        (
            True,
            {"handler_name": "AlpacaPretrainHandler"},
            "these are plain text, for `tandem pretrain`; to read them as conversations, give --handler-name",
        ),
        (
            False,
            {"prompt_type": "qwen3"},
            "these are conversations, for `tandem finetune`; to read them as text, give --handler-name",
        ),
    ],
)
def test_raw_data_of_another_kind_are_refused_before_the_work(
    instructions: bool, values: dict, message: str, workspace: Workspace, tmp_path: Path, never: None
) -> None:
    settings = settings_for(workspace, workspace.questions, tmp_path, instructions=instructions, **values)
    with pytest.raises(UserError, match=message):
        prepare(settings, World())
    with pytest.raises(UserError, match=message):
        dry_run(settings, 1)


def test_preferences_are_named(workspace: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "pairs.jsonl"
    raw.write_text(json.dumps({"instruction": "q", "chosen": "a", "rejected": "b"}) + "\n")
    values = {"instructions": True, "prompt_type": "qwen3", "handler_name": "AlpacaStylePairwiseHandler"}
    with pytest.raises(UserError, match="these are preferences, for `tandem finetune --stage dpo`"):
        prepare(settings_for(workspace, raw, tmp_path, **values), World())
    options = {"prompt_type": "qwen3", "handler_name": "AlpacaStylePairwiseHandler"}
    preprocess(PreprocessOptions((str(raw),), str(tmp_path / "pairs"), str(workspace.hf), **options))
    with pytest.raises(UserError, match="these data are preferences, for `tandem finetune --stage dpo`"):
        prepare(settings_for(workspace, tmp_path / "pairs", tmp_path, instructions=True), World())


def test_rows_with_a_label_are_not_trained_all_alike(workspace: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "labels.jsonl"
    raw.write_text(json.dumps({"instruction": "q", "output": "a", "label": False}) + "\n")
    settings = settings_for(workspace, raw, tmp_path, instructions=True, prompt_type="qwen3")
    with pytest.raises(UserError, match="unpaired preferences, for `tandem finetune --stage kto`; to train on all"):
        prepare(settings, World())


def test_what_was_removed_from_a_cache_is_made_again(workspace: Workspace, tmp_path: Path) -> None:
    raw = settings_for(workspace, workspace.corpus, tmp_path)
    (prefix,) = with_preprocessed(raw).data.data_path
    tokens = Path(f"{prefix}.bin").read_bytes()
    for suffixes in (["bin"], ["idx"], ["bin", "idx"]):
        for suffix in suffixes:
            Path(f"{prefix}.{suffix}").unlink()
        assert with_preprocessed(raw).data.data_path == (prefix,)
        assert Path(f"{prefix}.bin").read_bytes() == tokens
        assert Path(f"{prefix}.idx").exists()


def test_raw_data_that_changed_are_said_to_have(workspace: Workspace, tmp_path: Path) -> None:
    raw = tmp_path / "x.txt"
    raw.write_text(workspace.corpus.read_text()[:20_000])
    settings = settings_for(workspace, raw, tmp_path, save=str(tmp_path / "run"), train_iters=1, lr_warmup_iters=0)
    train(settings)
    with raw.open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="since its raw data, or the flags for reading them, have changed") as caught:
        train(settings)
    assert caught.value.flags == ("--save", "--load")  # what the error says:
    checkpoint = dataclasses.replace(settings.checkpoint, load=settings.checkpoint.save)
    training = dataclasses.replace(settings.training, train_iters=2)
    assert train(dataclasses.replace(settings, checkpoint=checkpoint, training=training)).progress.iteration == 2


def test_preprocessed_data_with_the_name_of_a_raw_folder_are_said(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{workspace.text}_text_document"
    for suffix in ("bin", "idx"):
        shutil.copy(f"{name}.{suffix}", tmp_path / f"text.{suffix}")
    (tmp_path / "text").mkdir()
    train(workspace.settings("torch", data_path=str(tmp_path / "text"), train_iters=1, lr_warmup_iters=0))
    assert f"{tmp_path}/text: preprocessed data, not the folder of the same name" in capsys.readouterr().out
