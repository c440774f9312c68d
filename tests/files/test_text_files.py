"""Text files that cannot be read: the error names the file, the reason, and the command that helps."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tandem.__main__ import main
from tandem.errors import UserError
from tandem.files.text import read_json, read_lines, read_text
from workspace import Workspace

CHINESE = '{"text": "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"}\n'


def convert(error: str) -> str:
    """Run the command that an error advises, as a shell does; returns the encoding."""
    command = re.search(r"mv -n .* > ('[^']+'|[^\s)]+)", error)
    assert command, error
    subprocess.run(command[0], shell=True, check=True)
    return re.search(r"iconv -f (\S+)", command[0])[1]  # type: ignore[index]


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_another_encoding_is_named_with_a_command_that_works(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "my file.json"
    file.write_text(CHINESE, encoding=encoding)
    with pytest.raises(UserError, match=f"looks like {encoding.upper()}") as error:
        read_text(file)
    assert convert(str(error.value)) == encoding.upper()
    assert read_text(file) == CHINESE
    assert Path(f"{file}.{encoding}").read_text(encoding=encoding) == CHINESE  # the user's own is kept


def test_text_of_the_west_is_not_taken_for_chinese(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("déjà vu, garçon, naïve, Zürich", encoding="latin-1")
    with pytest.raises(UserError, match="not UTF-8") as error:
        read_text(tmp_path / "x")
    assert "looks like" not in str(error.value)


def test_only_ends_of_lines_divide_a_file(tmp_path: Path) -> None:
    """U+2028 and U+0085 may stand in a JSON text as they are."""
    (tmp_path / "x.jsonl").write_bytes('\ufeff"a\u2028b\x85"\r\n \r\n\r\n"c"'.encode())
    assert [(number, json.loads(line)) for number, line in read_lines(tmp_path / "x.jsonl")] == [
        (1, "a\u2028b\x85"),
        (4, "c"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_dangling_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/no/such")
    with pytest.raises(UserError, match="link to /no/such"):
        read_text(tmp_path / "x")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.txt", "data.jsonl.gz", "data.csv.xz"])
@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_data_in_another_encoding(
    name: str, encoding: str, tmp_path: Path, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"csv": 'text\n"学而时习之，不亦说乎"\n', "json": f"[{CHINESE}]"}.get(name.split(".")[1], CHINESE)
    compress = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(compress(text.encode(encoding)))
    words = ["--input", str(tmp_path / name), "--output-prefix", str(tmp_path / "out" / "x")]
    command = ["preprocess", *words, "--tokenizer-name-or-path", str(workspace.hf)]
    assert main(command) == 2
    assert convert(capsys.readouterr().err) == encoding.upper()
    assert main(command) == 0, capsys.readouterr().err


def test_configs_in_another_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(CHINESE, encoding="gbk")
    assert main(["plan", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "config.json: not UTF-8" in error
    convert(error)
    assert main(["plan", str(tmp_path)]) == 2
    assert "UTF-8" not in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("save: 学而时习之\n", encoding="gbk")
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert convert(capsys.readouterr().err) == "GBK"
    assert main(["pretrain", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "UTF-8" not in capsys.readouterr().err


def test_small_files_of_a_model_and_questions(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("tokenizer_config.json", "generation_config.json", "tokenizer.json")):
        folder = tmp_path / str(number)
        shutil.copytree(workspace.hf, folder)
        (folder / name).write_text(CHINESE, encoding="gbk")
        assert main(["export", str(folder), str(tmp_path / "out"), "--no-verify"]) == 2 or name == "tokenizer.json"
        assert main(["generate", str(folder), "hi"]) == 2
        assert f"iconv -f GBK -t UTF-8 {folder / name}.gbk" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text(CHINESE, encoding="gbk")
    assert main(["evaluate", str(workspace.hf), str(tmp_path / "q.jsonl"), "--seq-length", "32"]) == 2
    assert "q.jsonl:1: not UTF-8" in capsys.readouterr().err
