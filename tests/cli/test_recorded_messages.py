"""Messages about folders, data, settings and runs as recorded examples: whoever changes one sees it here.

To record again what is right: PYTHONPATH=src:tests python tests/cli/test_recorded_messages.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from message_scenes import PARTS, SCENES, Scene, make_files

from frameworks import require_framework
from tandem.__main__ import main
from tandem.logs import printed
from workspace import Workspace, make_workspace

MOST_WORDS = 20
RECORDED = Path(__file__).with_name("recorded") / "messages.txt"


def linked(source: str, target: str) -> None:
    """Large files are not copied. Scenes replace them, and change none."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def message(scene: Scene, files: Path, folder: Path) -> str:
    """What the command prints in a copy of the files, without paths of this machine."""
    shutil.copytree(files, folder, copy_function=linked)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(out),
    ):
        patch.chdir(folder)
        patch.setenv("HF_HOME", "no cache")
        scene.make()
        with scene.during():
            main(shlex.split(scene.line))
    text = out.getvalue().replace(f"{folder}/", "").replace(str(folder), ".")
    return "".join(line for line in text.splitlines(keepends=True) if scene.only in line)


def example(title: str, text: str) -> str:
    return f"# {title}\n$ tandem {SCENES[title].line}\n{text}"


@pytest.fixture(scope="module")
def files(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("messages")
    make_files(workspace, root / "files")
    return root / "files"


@pytest.mark.parametrize("title", SCENES)
def test_messages_are_as_recorded(title: str, files: Path, tmp_path: Path) -> None:
    if "mindspore" in SCENES[title].line:
        require_framework("mindspore")
    text = message(SCENES[title], files, tmp_path / "here")
    assert text
    assert example(title, text) in RECORDED.read_text(encoding="utf-8")


def test_no_example_is_left_over() -> None:
    titles = [line[2:] for line in RECORDED.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert titles == list(SCENES)


def test_sentences_of_messages_are_short() -> None:
    text = re.sub("`[^`]*`", "x", RECORDED.read_text(encoding="utf-8"))
    said = [line for line in text.splitlines() if not line.startswith(("#", "$", "==="))]
    sentences = [sentence for line in said for sentence in re.split(r"(?<=[.!?:;])\s+", line)]
    assert [sentence for sentence in sentences if len(sentence.split()) > MOST_WORDS] == []


def recorded(root: Path) -> Iterator[str]:
    """The whole file."""
    files = root / "files"
    (root / "workspace").mkdir()
    make_files(make_workspace(root / "workspace"), files)
    for part, scenes in PARTS:
        yield f"=== {part} ===\n"
        for number, (title, scene) in enumerate(scenes.items()):
            yield example(title, message(scene, files, root / f"{part} {number}" / "here"))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder, printed():
        RECORDED.write_text("\n".join(recorded(Path(folder))), encoding="utf-8")
