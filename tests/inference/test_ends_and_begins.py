"""Where an answer ends and how a prompt begins: as transformers has it, from every file that says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.random_init import RandomSource
from tandem.errors import UserError
from tandem.inference.chat import open_model
from tandem.inference.options import LoadOptions
from tandem.inference.sampling import Sampling
from workspace import Workspace

PROMPT = "Reverse 123."
NEW = 8


@pytest.fixture
def model(workspace: Workspace, tmp_path: Path) -> Path:
    """Weights so large, and a head so different from the embedding, that no token is followed by itself alone."""
    source = open_source(workspace.hf)
    config = replace(source.config, init_method_std=0.5, untie_embeddings_and_output_weights=True)
    copy(RandomSource(config, 1), HFSink(tmp_path / "model", config, "float32", source.companions))
    return tmp_path / "model"


def put(folder: Path, name: str, **values: object) -> None:
    """Change a JSON file of a model, or make it."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def theirs(folder: Path) -> list[int]:
    """The greedy continuation of the prompt, as transformers makes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    made = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return list(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_answer_ends_at_each_token_that_a_file_names(model: Path, framework: str, file: str, tmp_path: Path) -> None:
    """A list, as Qwen3's; and a tokenizer that lies elsewhere changes nothing."""
    whole = theirs(model)
    end = next(token for token in whole[1:] if token != whole[0])
    put(model, file, eos_token_id=[1, end])
    expected = theirs(model)
    assert len(expected) < NEW
    assert expected[-1] == end
    asked = open_model(LoadOptions(str(model), ai_framework=framework, raw=True))
    text = asked.tokenizer.decode(expected[:-1], skip_special_tokens=True)
    assert asked.answer([PROMPT], Sampling(max_new_tokens=NEW)) == [text]
    alone = tmp_path / "tokenizer"
    alone.mkdir()
    for path in model.glob("tokenizer*"):
        shutil.copy(path, alone)
    elsewhere = LoadOptions(str(model), ai_framework=framework, raw=True, tokenizer_name_or_path=str(alone))
    assert open_model(elsewhere).answer([PROMPT], Sampling(max_new_tokens=NEW)) == [text]


@pytest.mark.parametrize("pieces", ["[BOS] $A", "[BOS] $A [EOS]", "$A [EOS]"])
def test_a_raw_prompt_begins_as_the_tokenizer_begins_texts(model: Path, pieces: str) -> None:
    """As in pretraining. What the tokenizer puts behind a text would end the prompt."""
    path = model / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    bos, eos = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    words = pieces.replace("[BOS]", "<|endoftext|>").replace("[EOS]", "<|im_end|>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=words, special_tokens=[("<|endoftext|>", bos), ("<|im_end|>", eos)]
    )
    tokenizer.save(str(path))
    asked = open_model(LoadOptions(str(model), ai_framework="torch", raw=True))
    text = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    assert asked.prompt_ids(PROMPT) == ([bos, *text] if "[BOS]" in pieces else text)
    assert asked.prompt_ids(f"{PROMPT}<|im_end|>")[-1] == eos  # one that the user wrote
    chat = open_model(LoadOptions(str(model), ai_framework="torch"))
    assert chat.prompt_ids(PROMPT)[0] == tokenizer.token_to_id("<|im_start|>")  # a template writes all itself


@pytest.mark.parametrize("described", [False, True])
def test_special_tokens_map_counts_where_tokens_are_not_described(model: Path, described: bool) -> None:
    """As in transformers, whose tokenizer is asked."""
    from transformers import AutoTokenizer

    ids = {"<|endoftext|>": 289, "<|im_start|>": 290, "<|im_end|>": 291, "<think>": 292, "</think>": 293}
    decoder = {str(number): {"content": token, "special": True} for token, number in ids.items()}
    if described:
        put(model, "tokenizer_config.json", added_tokens_decoder=decoder)
    put(model, "special_tokens_map.json", eos_token={"content": "<|endoftext|>", "special": True})
    asked = open_model(LoadOptions(str(model), ai_framework="torch"))
    assert asked.tokenizer.end_ids[0] == AutoTokenizer.from_pretrained(model).eos_token_id
    assert (asked.tokenizer.end_ids[0] == asked.tokenizer.token_to_id("<|endoftext|>")) is not described


@pytest.mark.parametrize("value", ["<|im_end|>", [1, "x"], 1.5, -1, True])
def test_end_tokens_that_are_no_ids_are_refused(model: Path, value: object) -> None:
    put(model, "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id"):
        open_model(LoadOptions(str(model), ai_framework="torch"))
