"""README: its commands run, in order, and both languages show the same ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#:]+)\)")


def commands(readme: str) -> list[list[str]]:
    """The lines of the bash blocks as words; continued lines joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.slow("sizes")
def test_the_walkthrough_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "mindspore"):
        require_framework(name)
    monkeypatch.chdir(tmp_path)
    short = ["--pretrain-iters", "2", "--finetune-iters", "2", "--questions", "2"]
    assert main(["quickstart", *short]) == 0  # what `make quickstart` runs, shortened
    steps = [words[1:] for words in commands("README.md") if words[0] == "tandem"]
    expected = ["generate", "report"]
    expected += ["convert", "preprocess", "preprocess", "pretrain", "finetune", "export", "generate"]
    expected += ["pretrain", "plan", "report", "doctor"]
    assert [words[0] for words in steps] == expected
    for words in steps:
        assert main(words) == 0, words


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in commands("README.md") if words[0] == "make"]
    assert targets == ["quickstart", "docs", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_both_languages_show_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh.md")


PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"))
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    broken = [link for link in LINK.findall(text) if not ((ROOT / page).parent / link).exists()]
    assert not broken
