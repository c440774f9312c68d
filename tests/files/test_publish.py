"""A folder appears whole or not at all, also where one is there already, whenever the process is killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.checkpoints.folders import TRACKER, find_iteration
from tandem.errors import UserError
from tandem.files import publish
from tandem.files.publish import INSIDE, TEMPORARY, WHOLE, Publication, check_free_space, final_place, recover

NAMES = ("config.json", "iter_1/index.json", "model.safetensors", "tokenizer.json")


def write(final: Path, text: str, *, replace: bool = False) -> None:
    publication = Publication(final, replace=replace)
    for name in NAMES:
        path = publication.work / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    publication.commit()


def texts(final: Path) -> dict[str, str]:
    return {str(path.relative_to(final)): path.read_text() for path in final.rglob("*") if path.is_file()}


def whole(text: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, text)


class Killed(BaseException):
    pass


@contextmanager
def killed_after(changes: int) -> Iterator[list[str]]:
    """The process dies when it has renamed and removed that many things; yields what it did."""
    done: list[str] = []

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if len(done) == changes:
                raise Killed
            done.append(f"{act.__name__} {args[0]}")
            return act(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "rmdir", counted(Path.rmdir))
        patch.setattr(publish.shutil, "rmtree", counted(shutil.rmtree))
        try:
            yield done
        except Killed:
            done.append("killed")


@pytest.mark.parametrize("changes", range(6))
def test_a_kill_while_an_iteration_is_exchanged(changes: int, tmp_path: Path) -> None:
    """The former or the new one is there when the folder is next read, and when it is next written."""
    final = tmp_path / "iter_0000007"
    write(final, "former", replace=True)
    with killed_after(changes) as done:
        write(final, "new", replace=True)
    assert (done[-1] == "killed") == (changes < 4), done
    assert texts(find_iteration(tmp_path, 7)) == whole("new" if changes > 2 else "former")
    write(final, "next", replace=True)
    assert texts(final) == whole("next")
    assert [path.name for path in tmp_path.iterdir()] == [final.name]


@pytest.mark.parametrize("changes", range(8))
def test_a_kill_while_an_empty_folder_is_filled(changes: int, tmp_path: Path) -> None:
    final = tmp_path / "mount"
    (final / "lost+found").mkdir(parents=True)
    with killed_after(changes) as done:
        write(final, "new")
    assert (done[-1] == "killed") == (changes < 7), done
    if changes < 5:
        assert not (final / "config.json").exists()  # nobody takes a half for a whole
    if changes > 1:  # it was flushed
        recover(final)
        assert texts(final) == whole("new")
        with pytest.raises(UserError, match="not an empty folder"):
            write(final, "again")
    else:
        write(final, "again")
        assert texts(final) == whole("again")
    assert {path.name for path in final.iterdir()} == {"lost+found", *(name.split("/")[0] for name in NAMES)}


def test_what_cannot_be_put_in_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{TEMPORARY}old-iter_0000007").mkdir()

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"iter_0000007: a process was killed .* Read-only file system"):
        find_iteration(tmp_path, 7)


def test_messages_name_the_final_place(tmp_path: Path) -> None:
    assert final_place(Publication(tmp_path / "m").work / f"{TEMPORARY}iter_1" / "x") == tmp_path / "m/iter_1/x"
    (tmp_path / "empty").mkdir()
    assert final_place(Publication(tmp_path / "empty").work / "x") == tmp_path / "empty/x"
    assert final_place(tmp_path / WHOLE / "x") == final_place(tmp_path / INSIDE / "x") == tmp_path / "x"
    with pytest.raises(UserError, match=rf"^{tmp_path}/m/iter_1 needs"):
        check_free_space(tmp_path / f"{TEMPORARY}m" / "iter_1", 1 << 60)


@pytest.mark.parametrize("text", [b"\xff\xfe", "²".encode(), b"-3", b""], ids=repr)
def test_a_damaged_tracker_file(text: bytes, tmp_path: Path) -> None:
    (tmp_path / TRACKER).write_bytes(text)
    with pytest.raises(UserError, match=r"expected the number of an iteration"):
        find_iteration(tmp_path)
