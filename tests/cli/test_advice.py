"""What a command tells the user to do works: an error or a summary is followed as it stands, and it goes on.

Advice that other tests follow: YaRN in config.json, and an earlier iteration (tests/training), `iconv`
(tests/files/test_text_files.py), locks (tests/files/test_lock.py), DPO's defaults (tests/training).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import advice_benchmarks
import advice_data
import advice_models
import advice_training
import pytest
from advice_places import make_places

from frameworks import require_framework
from tandem.__main__ import main
from workspace import Workspace

TABLES = (advice_training.CASES, advice_data.CASES, advice_models.CASES, advice_benchmarks.CASES)
CASES = {name: case for table in TABLES for name, case in table.items()}


@pytest.fixture(scope="module")
def places(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    require_framework("torch")
    # For lm-evaluation-harness: nothing is fetched, and no cache of the user is written.
    home = str(tmp_path_factory.mktemp("huggingface"))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=home)
    return make_places(workspace, tmp_path_factory.mktemp("advice"))


@pytest.mark.parametrize("name", CASES)
def test_advice_works(
    name: str, places: dict[str, Path | str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    if "mindspore" in case.line:
        require_framework("mindspore")
    names = {**places, "new": tmp_path / "new"}
    if case.copies:
        names[case.copies] = shutil.copytree(places[case.copies], tmp_path / case.copies)
    assert main(shlex.split(case.line.format(**names))) == case.ends
    said = "".join(capsys.readouterr())
    found = re.search(case.advice, said)
    assert found, said
    followed = case.follow(case.line, found)
    for line in [followed] if isinstance(followed, str) else followed:
        code = main(shlex.split(line.format(**names)))
        said = "".join(capsys.readouterr())
        assert code == 0, said
    assert case.says in said


def test_no_case_has_the_name_of_another() -> None:
    assert len(CASES) == sum(map(len, TABLES))
