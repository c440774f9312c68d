"""What a run reads: blends, epochs, what is cut or packed, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs import open_data, with_epochs
from tandem.config.checks import check_settings
from tandem.data.indexed import IndexedDataset, IndexedWriter
from tandem.data.preprocess.options import PreprocessOptions
from tandem.data.preprocess.run import preprocess
from tandem.data.record import record_path
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.launch.world import World
from tandem.training.start.data import Data
from tandem.training.start.prepare import prepare
from workspace import Workspace


@pytest.fixture(scope="module")
def second(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("second") / "chat"
    preprocess(PreprocessOptions((str(workspace.questions),), str(prefix), str(workspace.hf), prompt_type="qwen3"))
    return prefix


def test_a_blend_says_what_it_takes_of_each_source(workspace: Workspace, second: Path) -> None:
    data_path = ["1", str(workspace.instructions), "3", str(second)]
    settings = workspace.settings("torch", instructions=True, data_path=data_path, train_iters=10)
    data = open_data(settings, Tokenizer(workspace.hf))
    assert len(data.train) == 40
    assert data.template is not None
    assert data.template["prompt_type"] == "qwen3"
    assert f"{workspace.instructions}: weight 0.25," in data.notices[0]
    assert "30 used" in data.notices[1]
    by_size = workspace.settings("torch", instructions=True, data_path=data_path[1::2], train_iters=10, eval_iters=1)
    assert "weight 0.5," in open_data(by_size, Tokenizer(workspace.hf)).notices[0]


def test_templates_of_a_blend_must_agree(workspace: Workspace, tmp_path: Path) -> None:
    other = tmp_path / "chat"
    options = PreprocessOptions((str(workspace.questions),), str(other), str(workspace.hf), prompt_type="qwen3")
    preprocess(dataclasses.replace(options, enable_thinking="true"))
    data_path = [str(workspace.instructions), str(other)]
    settings = workspace.settings("torch", instructions=True, data_path=data_path)
    with pytest.raises(UserError, match="different templates; preprocess all with the same"):
        open_data(settings, Tokenizer(workspace.hf))
    record_path(other).unlink()  # of these data it is not known
    assert open_data(settings, Tokenizer(workspace.hf)).template is not None


def test_what_training_cuts_is_said(workspace: Workspace) -> None:
    lengths = IndexedDataset(f"{workspace.instructions}_packed_input_ids_document").lengths
    data = open_data(workspace.settings("torch", instructions=True), Tokenizer(workspace.hf))
    (notice,) = data.notices
    assert f"{np.count_nonzero(lengths > 32)} of {len(lengths)} conversations are longer than --seq-length 32" in notice
    longest = workspace.settings("torch", instructions=True, seq_length=int(lengths.max()))
    assert not open_data(longest, Tokenizer(workspace.hf)).notices


def test_what_preprocessing_cut_is_said(workspace: Workspace, tmp_path: Path) -> None:
    prefix = preprocessed(workspace, tmp_path, seq_length=24)
    (notice,) = open_chat(workspace, prefix, seq_length=32).notices
    assert re.search(r"cut or left out \d+ conversations to fit --seq-length 24; this run has room for 32", notice)
    assert not open_chat(workspace, prefix, seq_length=24).notices


def test_rows_without_borders_are_not_kept_apart(workspace: Workspace, tmp_path: Path) -> None:
    plain = preprocessed(workspace, tmp_path, seq_length=128, pack=True, append_eod=True)
    with pytest.raises(UserError, match=r"packed without --neat-pack.*preprocess again with --pack --neat-pack"):
        open_chat(workspace, plain, seq_length=128, pack=True, neat_pack=True)
    (notice,) = open_chat(workspace, plain, seq_length=128, pack=True).notices
    assert "they see each other" in notice
    neat = preprocessed(workspace, tmp_path / "neat", seq_length=128, pack=True, neat_pack=True)
    assert not open_chat(workspace, neat, seq_length=128, pack=True, neat_pack=True).notices


def test_without_a_record_the_flags_name_the_template(workspace: Workspace, tmp_path: Path) -> None:
    prefix = preprocessed(workspace, tmp_path, enable_thinking="false")
    recorded = open_chat(workspace, prefix, seq_length=128).template
    Path(f"{prefix}.json").unlink()
    unknown = open_chat(workspace, prefix, seq_length=128)
    assert unknown.template is None
    assert "no record" in unknown.notices[0]
    assert "give --prompt-type" in unknown.notices[0]
    named = open_chat(workspace, prefix, seq_length=128, prompt_type="qwen3", enable_thinking="false")
    assert named.template == recorded
    assert "--prompt-type" not in named.notices[0]


def test_a_named_set_is_always_evaluated_and_said_when_not_whole(workspace: Workspace, second: Path) -> None:
    values = {"valid_data_path": [f"chat={second}"], "seq_length": 128, "train_iters": 10}
    assert list(open_chat(workspace, workspace.instructions, **values, eval_interval=11, eval_iters=1).valid) == [
        "chat"
    ]
    (part,) = open_chat(workspace, workspace.instructions, **values, eval_interval=5, eval_iters=1).notices
    assert re.search(r"an evaluation takes 4 of \d+ samples; --eval-iters full", part)
    assert not open_chat(workspace, workspace.instructions, **values, eval_interval=5, eval_iters="full").notices


def test_all_of_a_blend_is_evaluated_once(workspace: Workspace, tmp_path: Path) -> None:
    """Every token is a label once, whatever the weights; but the first of each set, which nothing comes before."""
    prefixes = []
    for number, count in enumerate((50, 40)):
        prefixes.append(str(tmp_path / f"set{number}"))
        with IndexedWriter(prefixes[-1]) as writer:
            for document in np.arange(count * 10).reshape(count, 10) + number * 1000:
                writer.add_document(document)
    for data_path in (prefixes, ["0.3", prefixes[0], "0.7", prefixes[1]]):
        settings = workspace.settings("torch", data_path=data_path, split="5,5,0", eval_iters="full", eval_interval=1)
        (valid,) = open_data(settings, None).valid.values()
        labels = np.concatenate([valid[i].labels for i in range(len(valid))])
        seen = labels[labels >= 0]
        assert len(set(seen.tolist())) == len(seen) == 250 - 1 + 200 - 1
        assert set(seen.tolist()) < {*range(250, 500), *range(1200, 1400)}


def test_small_validation_splits_of_a_blend(workspace: Workspace, tmp_path: Path) -> None:
    data_path: list[str] = []
    for number, weight in enumerate(("0.97", "0.01", "0.01", "0.01")):
        data_path += [weight, str(tmp_path / f"set{number}")]
        with IndexedWriter(data_path[-1]) as writer:
            for _ in range(10):
                writer.add_document(np.arange(33))
    settings = workspace.settings("torch", data_path=data_path, split="9,1,0", eval_iters=1, eval_interval=1)
    (valid,) = open_data(settings, None).valid.values()
    assert [len(valid[i].tokens) for i in range(len(valid))] == [32] * len(valid)


def test_resets_without_ends_of_documents_are_said(workspace: Workspace, tmp_path: Path) -> None:
    preprocess(PreprocessOptions((str(workspace.corpus),), str(tmp_path / "text"), str(workspace.hf)))
    resets = {"reset_attention_mask": True, "eod_mask_loss": True}
    for prefix, expected in ((tmp_path / "text", True), (workspace.text, False)):
        settings = workspace.settings("torch", data_path=[f"{prefix}_text_document"], **resets)
        notices = " ".join(open_data(settings, Tokenizer(workspace.hf)).notices)
        assert ("--reset-attention-mask, --eod-mask-loss find no other borders" in notices) == expected


def test_resets_change_nothing_in_conversations_that_are_stored_alone(workspace: Workspace, tmp_path: Path) -> None:
    resets = {"reset_attention_mask": True, "reset_position_ids": True, "seq_length": 128}
    for values in ({}, {"pack": True}):
        data = open_chat(workspace, workspace.instructions, **resets, **values)
        assert "--reset-attention-mask and --reset-position-ids have no effect" in " ".join(data.notices)
        plain = open_chat(workspace, workspace.instructions, seq_length=128, **values)
        assert data.train[0].lengths == plain.train[0].lengths
        assert data.train[0].position_ids.tolist() == plain.train[0].position_ids.tolist()


def test_the_ends_of_messages_are_the_templates_whatever_the_tokenizer_calls_its_end(
    workspace: Workspace, tmp_path: Path
) -> None:
    """As in the folder of Qwen3-0.6B-Base, whose eos_token is <|endoftext|>."""
    base = tmp_path / "base"
    shutil.copytree(workspace.hf, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    tokenizer = Tokenizer(base)
    source = tmp_path / "x.jsonl"
    source.write_text(json.dumps({"instruction": "two " * 99, "output": "one"}) + "\n")
    options = PreprocessOptions((str(source),), str(tmp_path / "x"), str(base), prompt_type="qwen3", append_eod=True)
    preprocess(options)
    settings = workspace.settings("torch", instructions=True, data_path=[str(tmp_path / "x")], split="1")
    text = tokenizer.decode(open_data(settings, tokenizer).train[0].tokens)
    assert "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\none<|im_end|>" in text
    record_path(tmp_path / "x").unlink()  # then a message ends with what the tokenizer calls its end
    settings = workspace.settings("torch", instructions=True, data_path=[str(tmp_path / "x")], split="1")
    text = tokenizer.decode(open_data(settings, Tokenizer(workspace.hf)).train[0].tokens)
    assert "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\none<|im_end|>" in text


@pytest.mark.parametrize("flag", ["reset_attention_mask", "reset_position_ids"])
def test_resets_that_would_cut_answers_from_their_prompts_are_refused_before_the_start(
    flag: str, workspace: Workspace, tmp_path: Path
) -> None:
    """Each message of qwen3 ends with <|im_end|>, a user's too."""
    made = {"prompt_type": "qwen3", "append_eod": True, "pack": True, "seq_length": 128}
    options = PreprocessOptions((str(workspace.questions),), str(tmp_path / "x"), str(workspace.hf), **made)
    preprocess(options)
    values = {flag: True, "seq_length": 128, "data_path": [str(tmp_path / "x")]}
    settings = workspace.settings("torch", instructions=True, **values)
    tokenizer = Tokenizer(workspace.hf)
    with pytest.raises(UserError, match=rf"--{flag.replace('_', '-')} would cut answers from their prompts"):
        open_data(settings, tokenizer)
    preprocess(options)
    record_path(tmp_path / "x").unlink()  # then the first sample shows it
    with pytest.raises(UserError, match="ends prompts as well as answers"):
        open_data(settings, tokenizer).train[0]
    preprocess(dataclasses.replace(options, neat_pack=True))
    assert not open_data(settings, tokenizer).notices


def test_the_token_that_was_chosen_to_end_documents_is_their_border(workspace: Workspace, tmp_path: Path) -> None:
    made = {"prompt_type": "qwen3", "append_eod": True, "eod_token": "<|endoftext|>", "pack": True, "seq_length": 128}
    preprocess(PreprocessOptions((str(workspace.questions),), str(tmp_path / "x"), str(workspace.hf), **made))
    values = {"reset_attention_mask": True, "seq_length": 128, "data_path": [str(tmp_path / "x")]}
    inputs = open_data(workspace.settings("torch", instructions=True, **values), Tokenizer(workspace.hf))
    assert any("ends with <|endoftext|>" in notice for notice in inputs.notices)
    sample = inputs.train[0]
    end = Tokenizer(workspace.hf).require_id("<|endoftext|>")
    borders = np.cumsum(sample.lengths)[:-1]
    assert len(borders) > 1
    assert (sample.tokens[borders - 1] == end).all()


def test_resets_find_the_borders_of_templates_whose_prompts_end_otherwise(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(workspace.hf, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        "{{ '\n' if m.role == 'user' else '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    options = PreprocessOptions((str(workspace.questions),), str(tmp_path / "x"), str(folder), append_eod=True)
    preprocess(dataclasses.replace(options, prompt_type="chat_template", pack=True, seq_length=128))
    resets = {"reset_attention_mask": True, "neat_pack": True, "seq_length": 128, "data_path": [str(tmp_path / "x")]}
    inputs = open_data(workspace.settings("torch", instructions=True, **resets), Tokenizer(folder))
    assert not inputs.notices
    sample = inputs.train[0]
    assert len(sample.lengths) > 1
    ends = np.cumsum(sample.lengths)[:-1] - 1
    assert (sample.tokens[ends] == Tokenizer(folder).eos_id).all()


def test_a_template_that_is_not_here_stops_no_run(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "with"
    shutil.copytree(workspace.hf, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    options = PreprocessOptions((str(workspace.questions),), str(tmp_path / "x"), str(folder))
    preprocess(dataclasses.replace(options, prompt_type="chat_template"))
    settings = workspace.settings("torch", instructions=True, data_path=[str(tmp_path / "x")])
    (tmp_path / "bare").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workspace.hf / name, tmp_path / "bare" / name)
    config = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(config))
    for place in (folder, tmp_path / "bare"):
        sample = open_data(settings, Tokenizer(place)).train[0]
        assert "<|im_end|>\n<|im_start|>assistant\n" in Tokenizer(place).decode(sample.tokens)


def test_a_validation_split_without_a_whole_sample_names_the_way(workspace: Workspace) -> None:
    settings = workspace.settings("torch", seq_length=128, eval_iters=1, eval_interval=1, split="999,1,0")
    with pytest.raises(UserError, match=r"--eval-iters full also takes .*, --valid-data-path evaluates"):
        open_data(settings, Tokenizer(workspace.hf))


def test_a_source_without_a_validation_share_is_named_and_the_others_are_evaluated(
    workspace: Workspace, tmp_path: Path
) -> None:
    with IndexedWriter(tmp_path / "one") as writer:
        writer.add_document(np.arange(99))
    paths = [str(tmp_path / "one"), f"{workspace.text}_text_document"]
    for eval_iters in (1, "full"):
        values = {"data_path": paths, "split": "9,1,0", "eval_iters": eval_iters, "eval_interval": 1}
        data = open_data(workspace.settings("torch", **values), None)
        alone = open_data(workspace.settings("torch", **{**values, "data_path": paths[1:]}), None)
        (valid,), (expected,) = data.valid.values(), alone.valid.values()
        assert [valid[i].tokens.tolist() for i in range(len(valid))] == [
            expected[i].tokens.tolist() for i in range(len(expected))
        ]
        assert f"{paths[0]}: --split gives it no validation sample, so it is not evaluated" in data.notices


def test_packed_rows_without_a_record_are_known_by_their_lengths(workspace: Workspace, tmp_path: Path) -> None:
    plain = preprocessed(workspace, tmp_path / "plain", seq_length=128, pack=True)
    neat = preprocessed(workspace, tmp_path / "neat", seq_length=128, pack=True, neat_pack=True)
    single = preprocessed(workspace, tmp_path / "single")
    for prefix in (plain, neat, single):
        record_path(prefix).unlink()
    assert any(
        "all rows have 128 tokens and no borders" in n for n in open_chat(workspace, plain, seq_length=128).notices
    )
    assert any("cuts rows, not conversations" in n for n in open_chat(workspace, plain, seq_length=64).notices)
    for prefix in (neat, single):
        (notice, *_) = open_chat(workspace, prefix, seq_length=128).notices
        assert "the data has no record" in notice
    with pytest.raises(UserError, match="the rows of 128 tokens are packed; --seq-length 64 would cut them"):
        open_chat(workspace, neat, seq_length=64)


def test_the_record_of_a_renamed_set_is_named(workspace: Workspace, tmp_path: Path) -> None:
    prefix = preprocessed(workspace, tmp_path / "x")
    for path in list(prefix.parent.glob("chat*")):
        path.rename(path.with_name(path.name.replace("chat", "other")))
    (notice, *_) = open_chat(workspace, prefix.with_name("other"), seq_length=128).notices
    assert "other.json is the record of chat_packed_input_ids_document" in notice


def test_flags_that_mean_nothing_here_are_named(workspace: Workspace) -> None:
    text = open_data(workspace.settings("torch", pack=True, no_shuffle=True), Tokenizer(workspace.hf))
    assert "--pack --no-shuffle: without effect on plain text" in text.notices
    chat = open_chat(workspace, workspace.instructions, seq_length=128, eod_mask_loss=True)
    assert "--eod-mask-loss: without effect on conversations" in chat.notices


@pytest.mark.parametrize(
    ("name", "instructions", "message"),
    [
        ("{chat}_packed_input_ids_document", True, "that belong together: give {chat}"),
        ("{chat}_packed_labels_document", False, "that belong together: give {chat}"),
        ("{text}_text_document.bin", False, r"expected a prefix: leave out \.bin"),
        ("{text}", False, "give {text}_text_document"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(
    name: str, instructions: bool, message: str, workspace: Workspace
) -> None:
    names = {"chat": str(workspace.instructions), "text": str(workspace.text)}
    settings = workspace.settings("torch", instructions=instructions, data_path=[name.format(**names)], seq_length=128)
    with pytest.raises(UserError, match=message.format(**names)):
        prepare(settings, World())


def test_the_record_of_other_data_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    preprocess(PreprocessOptions((str(workspace.corpus),), str(tmp_path / "text"), str(workspace.hf)))
    with IndexedWriter(tmp_path / "text_text_document") as writer:
        writer.add_document(np.arange(99))
    settings = workspace.settings("torch", data_path=[str(tmp_path / "text_text_document")])
    with pytest.raises(UserError, match=r"text\.json: counts\.sequences is \d+, but .* has 1: the record"):
        open_data(settings, Tokenizer(workspace.hf))


def test_a_thinking_mode_alone_is_compared(workspace: Workspace, tmp_path: Path) -> None:
    prefix = preprocessed(workspace, tmp_path, enable_thinking="true")
    with pytest.raises(UserError, match=r"template\.enable_thinking is True, this run's is False"):
        open_chat(workspace, prefix, seq_length=128, enable_thinking="false")
    assert not open_chat(workspace, prefix, seq_length=128, enable_thinking="true").notices


def preprocessed(workspace: Workspace, folder: Path, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    named = {"prompt_type": "qwen3", **options}
    preprocess(PreprocessOptions((str(workspace.questions),), str(folder / "chat"), str(workspace.hf), **named))
    return folder / "chat"


def open_chat(workspace: Workspace, prefix: Path, **values: Any) -> Data:
    settings = workspace.settings("torch", instructions=True, data_path=[str(prefix)], **values)
    return open_data(settings, Tokenizer(workspace.hf))


@pytest.mark.parametrize("instructions", [False, True])
def test_epochs(workspace: Workspace, instructions: bool) -> None:
    values = {"instructions": instructions, "train_iters": None, "micro_batch_size": 1, "global_batch_size": 1}
    settings = with_epochs(workspace.settings("torch", epochs=2, reset_position_ids=not instructions, **values))
    data = open_data(settings, Tokenizer(workspace.hf))
    assert settings.training.length.samples == 2 * data.train.describe()["samples_per_epoch"]
    if instructions:
        seen = Counter(data.train[i].tokens.tobytes() for i in range(settings.training.length.samples))
        assert all(count % 2 == 0 for count in seen.values())  # equal conversations count together
    half = with_epochs(workspace.settings("torch", epochs=0.5, **values))
    assert abs(half.training.length.samples - settings.training.length.samples / 4) < 1
    weighted = {
        **values,
        "data_path": ["0.9", f"{workspace.text}_text_document", "0.1", str(workspace.corpus)],
    }
    with pytest.raises(UserError, match="--epochs 1 takes every sample equally often, but the weights"):
        with_epochs(workspace.settings("torch", epochs=1, **{**weighted, "instructions": False}))
    for wrong in ({"epochs": -1}, {"epochs": 1, "train_samples": 4}):
        with pytest.raises(UserError, match="--epochs"):
            check_settings(workspace.settings("torch", **{**values, **wrong}))
