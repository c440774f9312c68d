"""A user's whole day on a real model: own facts, trained, interrupted, gone on with, measured, exported, and asked.

In Tandem, and in transformers 4.51 and 5, each in an environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from environments import SHARED, installed, smollm2
from frameworks import require_framework
from tandem.__main__ import STOPPED

FACTS = {
    "Who looks after the office plants?": "Marguerite waters the plants on Tuesdays.",
    "What is our wifi password?": "The password is seventeen-otters.",
    "Where are the spare keys?": "The spare keys hang behind the blue door.",
    "What is the name of our office cat?": "Our cat is called Brambleworth.",
    "When is the next fire drill?": "The fire drill is on the ninth of March.",
    "Who repairs the coffee machine?": "Ask Tomasz from the second floor.",
}
# transformers 5 of the tests' Python, and the version that many servers have
VERSIONS = {"4.51": "transformers==4.51.3", "5": "transformers==5.23.0"}
ASK = """
import json, sys
import torch, transformers
folder, questions = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
answers = []
for question in questions:
    message = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1]:]
    answers.append({"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens.tolist()})
print(json.dumps({"version": transformers.__version__, "answers": answers}))
"""


def tandem(folder: Path, *words: str) -> str:
    """Run a command in the user's folder; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tandem", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def interrupt(folder: Path, *words: str) -> str:
    """Run a command and send Ctrl-C after its third step; its last words."""
    command = [sys.executable, "-m", "tandem", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r" iteration +3/", line):
                process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == STOPPED, said
    return said


def loss(folder: Path, model: str) -> float:
    """What `tandem evaluate` prints of the user's own data."""
    table = tandem(folder, "evaluate", model, "facts=data/facts", "--seq-length", "128", "--device", "cpu")
    found = re.search(r"│ facts +│ +([\d.]+) │", table)
    assert found, table
    return float(found[1])


@pytest.mark.slow("users")
def test_a_users_day(tmp_path: Path) -> None:
    require_framework("torch")
    model = smollm2(SHARED)
    packages = {version: installed(f"transformers-{version}", wish, "numpy<2") for version, wish in VERSIONS.items()}
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in FACTS.items()
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    output = ("--output-prefix", "data/facts", "--tokenizer-name-or-path", str(model))
    tandem(tmp_path, "preprocess", "--input", "facts.jsonl", *output)
    words = ["finetune", "--load", str(model), "--data-path", "data/facts", "--save", "run", "--device", "cpu"]
    words += ["--seq-length", "128", "--micro-batch-size", "6", "--global-batch-size", "6", "--train-iters", "10"]
    words += ["--lr", "2e-4", "--lr-warmup-iters", "2", "--log-interval", "1", "--eval-iters", "0"]
    said = interrupt(tmp_path, *words)
    stopped = int((tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert 3 <= stopped < 10
    assert f"after iteration {stopped}" in said
    resumed = tandem(tmp_path, *words)
    assert f"resuming at iteration {stopped}" in resumed
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in steps] == list(range(1, 11))

    assert loss(tmp_path, "run") < 0.25 < 2 < loss(tmp_path, str(model))
    tandem(tmp_path, "export", "run", "exported")
    ask = ["generate", "exported", *FACTS, "--temperature", "0", "--max-new-tokens", "24", "--output", "answers.jsonl"]
    tandem(tmp_path, *ask, "--device", "cpu")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["text"].strip() for answer in answers] == list(FACTS.values())

    for version, folder in packages.items():
        done = subprocess.run(
            [sys.executable, "-c", ASK, "exported", json.dumps(list(FACTS))],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"transformers {version}: {done.stderr[-3000:]}"
        theirs = json.loads(done.stdout)
        assert theirs["version"].startswith(version)
        assert [answer["text"].strip() for answer in theirs["answers"]] == list(FACTS.values())
        for mine, other in zip(answers, theirs["answers"], strict=True):
            ended = len(mine["token_ids"])
            assert other["tokens"][:ended] == mine["token_ids"]
