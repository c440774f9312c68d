"""What goes wrong with folders, data, settings and runs: the scenes of test_recorded_messages.py.

Each scene is made in a folder of its own, in which `hf`, `text_text_document`, `chat` and a `run` lie.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from frameworks import require_framework
from tandem.__main__ import main
from tandem.checkpoints.folders import TRACKER
from tandem.files.lock import Holder, locked
from workspace import Workspace

SETTINGS = (
    "load: hf\nai_framework: torch\ndevice: cpu\nseq_length: 32\nmicro_batch_size: 2\nglobal_batch_size: 4\n"
    "train_iters: 2\nlr: 0.001\nsplit: 100,0,0\neval_iters: 0\n"
)
TRAIN = "pretrain --config run.yaml"
PREPROCESS = "preprocess --output-prefix out/x --tokenizer-name-or-path hf --input"


@dataclass(frozen=True)
class Scene:
    """A command, and what lies in the folder in which it is given.

    Attributes:
        make: makes what the command meets, in the working folder.
        only: a text; only lines that hold it are recorded.
        during: what goes on while the command runs.
    """

    line: str
    make: Callable[[], Any] = lambda: None
    only: str = ""
    during: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_files(workspace: Workspace, root: Path) -> None:
    """What all scenes begin with. Two runs are among it, whose folder was moved since then."""
    require_framework("torch")
    made = root.with_name("made")
    shutil.copytree(workspace.hf, made / "hf")
    for path in workspace.root.iterdir():
        if path.is_file():
            shutil.copy(path, made)
    (made / "run.yaml").write_text(SETTINGS)
    before = Path.cwd()
    os.chdir(made)
    try:
        assert main(on(TEXT, "--save run").split()) == 0
        assert main(on(TEXT, "--save without --no-save-optim --exit-interval 1").split()) == 0
    finally:
        os.chdir(before)
    made.rename(root)


def write(name: str, *rows: Any) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def change(name: str, **values: Any) -> None:
    """Set keys of a JSON file."""
    Path(name).write_text(json.dumps({**json.loads(Path(name).read_text()), **values}))


def two_files_of_weights() -> None:
    shutil.copy("hf/model.safetensors", "hf/model-00001-of-00001.safetensors")
    write("hf/model.safetensors.index.json", {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}})


def renamed(rename: Callable[[str], str]) -> Callable[[], None]:
    """The weights under other names."""

    def make() -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file("hf/model.safetensors")
        Path("hf/model.safetensors").unlink()
        save_file({rename(name): tensor for name, tensor in tensors.items()}, "hf/model.safetensors", {"format": "pt"})

    return make


def fewer_rows() -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file("hf/model.safetensors")
    Path("hf/model.safetensors").unlink()
    rows = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:200].copy()}
    save_file({**tensors, **rows}, "hf/model.safetensors", {"format": "pt"})
    change("hf/config.json", vocab_size=200)


def pointer() -> None:
    Path("hf/model.safetensors").unlink()
    Path("hf/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def two_formats() -> None:
    for path in Path("hf").iterdir():
        shutil.copy(path, "run")


def dangling_link() -> None:
    Path("hf/tokenizer.json").unlink()
    Path("hf/tokenizer.json").symlink_to("../blobs/9f3c")


def trainer_output() -> None:
    for number in (500, 1000):
        shutil.copytree("hf", f"out/checkpoint-{number}")


def spoiled_pointer() -> None:
    path = Path("text_text_document.idx")
    content = bytearray(path.read_bytes())
    sequences = struct.unpack_from("<Q", content, 18)[0]
    struct.pack_into("<q", content, 34 + 4 * sequences, -(2**31))
    path.write_bytes(content)


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, *messages], **more}


BACK = "convert --load-dir run --save-dir hf --load-model-type mg --save-model-type hf"
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}


def listed(**entry: Any) -> Callable[[], None]:
    """A dataset in LLaMA-Factory's list."""

    def make() -> None:
        write("data/a.jsonl", {"instruction": "a", "output": "b"})
        write("data/dataset_info.json", {"mine": {"file_name": "a.jsonl", **entry}})

    return make


def encoded(name: str, encoding: str) -> Callable[[], Any]:
    text = '{"text": "学而时习之，不亦说乎"}\n'.encode(encoding)
    return lambda: Path(name).write_bytes(lzma.compress(text) if name.endswith(".xz") else text)


@contextmanager
def another_run(what: str, folder: str) -> Iterator[None]:
    """A lock as another process holds it, with the same names everywhere."""
    holder = Holder("node1", 4711, "2026-11-30 09:00:00", "tandem pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Holder, "this_process", classmethod(lambda _: holder))
        with locked(folder, what):
            yield


@contextmanager
def with_little(function: str, answer: Any) -> Iterator[None]:
    """A machine with little memory, or a full disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, lambda *_: answer)
        yield


def yaml(text: str) -> Callable[[], Any]:
    return lambda: Path("run.yaml").write_text(SETTINGS + text)


def cut(name: str, left: str) -> Callable[[], Any]:
    return lambda: Path(name).write_text(left)


def on(data: str, *more: str) -> str:
    return " ".join([TRAIN, "--data-path", data, *more])


TEXT = "text_text_document"
FOLDERS: dict[str, Scene] = {
    "--save is the folder of the weights": Scene(on(TEXT, "--save hf")),
    "a folder that holds two models": Scene("export run out", two_formats),
    "two files of weights, of which transformers reads one and vLLM the other": Scene(
        "export hf out", two_files_of_weights
    ),
    "one iteration of a run": Scene("export run/iter_0000002 out"),
    "an iteration that is not there": Scene("export run out --ckpt-step 3"),
    "what a Trainer wrote": Scene("generate out hi", trainer_output),
    "the name of a model on the hub": Scene("generate Qwen/Qwen3-0.6B hi"),
    "a run where a tokenizer is needed": Scene(
        "preprocess --input corpus.jsonl --output-prefix out/x --tokenizer-name-or-path run"
    ),
    "a link to a file that was not copied": Scene("export hf out", dangling_link),
    "a pointer in place of a file": Scene("export hf out", pointer),
    "weights of torch.compile": Scene(
        "export hf out --no-verify --no-certificate", renamed("_orig_mod.{}".format), only="_orig_mod"
    ),
    "weights of another model": Scene(
        "export hf out", renamed(lambda name: name.replace("mlp", "feed_forward").replace("model.", "transformer."))
    ),
    "two bases of rotary embeddings": Scene(
        "export hf out",
        lambda: change(
            "hf/config.json", rope_theta=10000.0, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
        ),
    ),
    "a conversion that was done before": Scene(
        f"{BACK} --no-verify", lambda: main([*BACK.split(), "--no-verify"]), only="error"
    ),
    "files that are no model's, and a model without a template": Scene(
        "export hf out --no-verify --no-certificate",
        lambda: (write("hf/train_data.json", {}), change("hf/tokenizer_config.json", chat_template=None)),
        only="> ",
    ),
    "the home of nobody": Scene("export run ~nobody-here/out"),
    "a variable that no shell replaced": Scene("export run $SCRATCH/out"),
    "a target that is there": Scene("export run hf"),
    "a folder that is not writable": Scene(on(TEXT, "--save run.yaml/x")),
}
DATA: dict[str, Scene] = {
    "no token that ends documents": Scene(
        f"{PREPROCESS} corpus.jsonl --append-eod",
        lambda: (change("hf/tokenizer_config.json", eos_token=None), change("hf/config.json", eos_token_id=None)),
    ),
    "columns that are not read": Scene(
        f"{PREPROCESS} a.jsonl",
        lambda: write("a.jsonl", chat(ANSWER, functions=[{"name": "f", "parameters": {}}], images=["a.png"], id=7)),
        only="> ",
    ),
    "arguments of a call that are no object": Scene(f"{PREPROCESS} a.jsonl", lambda: write("a.jsonl", chat(CALL))),
    "a picture": Scene(f"{PREPROCESS} a.jsonl", lambda: write("a.jsonl", chat(PICTURE, ANSWER))),
    "a conversation without an answer": Scene(f"{PREPROCESS} a.jsonl", lambda: write("a.jsonl", chat())),
    "fields that no handler reads": Scene(f"{PREPROCESS} a.jsonl", lambda: write("a.jsonl", {"question": "a", "n": 1})),
    "a field that no row has": Scene(
        f"""{PREPROCESS} a.jsonl --map-keys '{{"system": "sistem"}}'""",
        lambda: write("a.jsonl", chat(ANSWER, system="s")),
    ),
    "an unknown key of a listed dataset": Scene(
        f"{PREPROCESS} mine --handler-name LlamaFactoryInstructionHandler --dataset-dir data", listed(colums={})
    ),
    "a pointer into nothing": Scene(on(TEXT), spoiled_pointer),
    "a folder whose data lie deeper": Scene(f"{PREPROCESS} data", lambda: write("data/a/b.jsonl", {"text": "x"})),
    "the folder of a model in place of data": Scene(f"{PREPROCESS} hf"),
    "raw data where preprocessed data are needed": Scene("inspect data corpus.jsonl"),
    "conversations where questions are needed": Scene(
        "evaluate hf a.jsonl --seq-length 32 --device cpu --ai-framework torch",
        lambda: write("a.jsonl", chat(ANSWER)),
    ),
    "a tokenizer of more tokens than the model has rows": Scene(on(TEXT), fewer_rows),
    "data in GBK": Scene(f"{PREPROCESS} a.jsonl", encoded("a.jsonl", "gbk")),
    "data in UTF-16, compressed": Scene(f"{PREPROCESS} a.jsonl.xz", encoded("a.jsonl.xz", "utf-16")),
    "a value that takes several lines": Scene(
        f"{PREPROCESS} a.jsonl", lambda: Path("a.jsonl").write_text('{\n "text": "x"\n}\n')
    ),
}
SETTINGS_OF_A_RUN: dict[str, Scene] = {
    "what one framework lacks": Scene(on(TEXT, "--ai-framework mindspore --use-torch-fsdp2 --dry-run")),
    "layers that do not divide": Scene(on(TEXT, "--pipeline-model-parallel-size 6 --nproc-per-node 6 --dry-run")),
    "names of other tools": Scene("finetune --model hf --data chat --learning-rate 1e-3"),
    "names of other tools, in a file": Scene(on(TEXT), yaml("learning_rate: 1\n")),
    "a recipe as a word": Scene("pretrain run.yaml"),
    "a key twice": Scene(on(TEXT), yaml("lr: 0.1\n")),
    "a variable that is not set": Scene(on(TEXT), yaml("save: ${NOT_SET}/x\n")),
    "a variable without braces": Scene(on(TEXT), yaml("save: $HOME/x\n")),
    "a sequence that is too long for the model": Scene(on(TEXT, "--seq-length 4096")),
    "a flag that contradicts the weights": Scene(on(TEXT, "--num-layers 3")),
    "conversations for pretraining": Scene(on("chat")),
    "text for fine-tuning": Scene(on(TEXT).replace("pretrain", "finetune")),
    "context parallelism": Scene(on(TEXT, "--context-parallel-size 2")),
    "less memory than the run needs": Scene(
        on(TEXT, "--seq-length 512 --micro-batch-size 256 --global-batch-size 256 --dry-run"),
        during=partial(with_little, "tandem.training.start.room.memory_bytes", 10**9),
    ),
    "a layout of more processes than there are": Scene(
        on(TEXT, "--tensor-model-parallel-size 3 --nproc-per-node 2 --dry-run")
    ),
    "several machines, and no processes": Scene(on(TEXT, "--nnodes 2")),
    "no data, no weights and no length": Scene("pretrain --ai-framework torch --lr 1e-3"),
}
RUNS: dict[str, Scene] = {
    "a run that has its last step": Scene(on(TEXT, "--save run"), only="> nothing"),
    "another run's folder": Scene(on("chat", "--save run").replace("pretrain", "finetune")),
    "fine-tuning into the folder of its pretraining": Scene(
        on("chat", "--load run --finetune --save run").replace("pretrain", "finetune")
    ),
    "a checkpoint without an optimizer": Scene(on(TEXT, "--save without")),
    "other settings than the checkpoint's": Scene(
        on(TEXT, "--save run --train-iters 6 --lr 9e-3 --dry-run"), only="learning rate"
    ),
    "fine-tuning that goes on with a pretraining": Scene(
        on("chat", "--load run --train-iters 3 --dry-run").replace("pretrain", "finetune"), only="--finetune"
    ),
    "a record that was cut": Scene(
        on(TEXT, "--save run --train-iters 3"), cut("run/run.json", '{"format": "tandem-run'), only="record"
    ),
    "a tracker that is gone": Scene(
        on(TEXT, "--save run --train-iters 3"), lambda: Path(f"run/{TRACKER}").unlink(), only=TRACKER
    ),
    "a tracker that names nothing": Scene(
        on(TEXT, "--save run"), lambda: Path(f"run/{TRACKER}").write_text("9"), only=TRACKER
    ),
    "a state that was cut": Scene(
        on(TEXT, "--save run"), cut("run/iter_0000002/trainer_state.json", '{"iteration": 2')
    ),
    "a folder that another run uses": Scene(
        on(TEXT, "--save run"), during=partial(another_run, "--save run", "run"), only="error"
    ),
    "a full disk": Scene(
        on(TEXT, "--save new"), during=partial(with_little, "shutil.disk_usage", SimpleNamespace(free=10**6))
    ),
    "what both of two processes refuse": Scene(on(TEXT, "--save without --nproc-per-node 2"), only="error"),
    "no run to report": Scene("report hf"),
    "a run to verify": Scene("verify run"),
}
PARTS: Sequence[tuple[str, dict[str, Scene]]] = (
    ("Folders and files", FOLDERS),
    ("Data and models", DATA),
    ("Settings", SETTINGS_OF_A_RUN),
    ("Runs", RUNS),
)
SCENES = {title: scene for _, scenes in PARTS for title, scene in scenes.items()}
