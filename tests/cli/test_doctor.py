"""`tandem doctor`: what it finds here, and that it fails where no run could start."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from frameworks import require_framework
from tandem import doctor
from tandem.__main__ import main
from tandem.errors import UserError
from tandem.frameworks import FRAMEWORKS, SPELLINGS, check_framework


def test_this_machine_can_run(framework: str) -> None:
    """The frameworks that tests use are found with their version, device and launcher."""
    findings = {finding.subject: finding for finding in doctor.examine_framework(SPELLINGS[framework])}
    assert findings[framework].state.startswith(importlib.metadata.version(framework).split("+")[0])
    assert "cpu" in findings[f"{framework} devices"].state
    assert findings[SPELLINGS[framework].launcher].remedy == ""


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in packages else real(name))


def test_missing_frameworks_and_packages_are_named_with_their_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "torch", "mindspore", "tokenizers", "wandb")
    assert main(["doctor"]) == 2
    out, err = capsys.readouterr()
    for part in ("pip install 'tandem-llm[torch]'", "pip install 'tandem-llm[mindspore]'", "pip install tokenizers"):
        assert part in err
    assert "tandem-llm[wandb]" in out
    assert "wandb" not in err  # it is optional


def test_a_command_is_on_one_line_however_narrow_the_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "mindspore", "wandb")
    monkeypatch.setattr(doctor, "probe", lambda name: {"version": "2.13", "devices": "8 x H100", "dtypes": "bf16"})
    monkeypatch.setattr("tandem.cli.doctor.WIDTH", 40)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  ! mindspore: pip install 'tandem-llm[mindspore]'" in lines
    assert "  ! wandb (--wandb-project): pip install 'tandem-llm[wandb]'" in lines


def test_one_framework_is_enough(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without(monkeypatch, "mindspore", "wandb")
    monkeypatch.setattr(doctor, "probe", lambda name: {"version": "2.13", "devices": "8 x H100", "dtypes": "bf16"})
    assert main(["doctor"]) == 0
    assert "a run can start here" in capsys.readouterr().out


def test_what_is_lacking_to_compile_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"version": "2.13", "devices": "8 x H100", "dtypes": "bf16", "lacking": "Triton is missing; install it"}
    monkeypatch.setattr(doctor, "probe", lambda name: answer)
    findings = {finding.subject: finding for finding in doctor.examine_framework(SPELLINGS["torch"])}
    assert findings["torch compiler"].state == "Triton is missing, so each step takes longer"
    assert findings["torch compiler"].remedy == "install it"


def test_a_framework_that_does_not_start_is_no_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> dict[str, str]:
        raise RuntimeError("libhccl.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "probe", broken)
    diagnosis = doctor.examine()
    assert any("no framework works" in blocker for blocker in diagnosis.blockers)
    assert any("libhccl" in finding.state for finding in diagnosis.findings)


def test_a_crashing_probe_gives_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        doctor.probe("torch")


def test_numpy_2_is_refused_where_mindspore_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.1.0")
    assert "numpy<2" in doctor.examine_package("numpy").remedy
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.1.0" if name == "numpy" else None)  # no MindSpore
    assert doctor.examine_package("numpy").remedy == ""


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "3.0.0+cu130"), ("torch", "2.5.1"), ("mindspore", "2.11.0")]
)
def test_an_untested_version_is_refused_unless_asked_for(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_framework(package)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == package else real(name))
    with pytest.raises(UserError, match=f"pip install '{re.escape(SPELLINGS[package].requirement)}', or try {package}"):
        check_framework(package)
    monkeypatch.setattr(doctor, "probe", lambda name: {"version": version, "devices": "cpu", "dtypes": "fp32"})
    assert "pip install" in next(iter(doctor.examine_framework(SPELLINGS[package]))).remedy
    monkeypatch.setenv("TANDEM_ANY_VERSION", "1")
    assert check_framework(package).name == package


@pytest.mark.parametrize("version", ["2.7.1", "2.8.0"])
def test_older_versions_of_mindspore_are_accepted_with_a_notice(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_framework("mindspore")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "mindspore" else real(name))
    assert check_framework("mindspore").version_notice() == (
        f"mindspore {version}: Tandem is made for 2.9 and newer; with this one only parts of its tests ran"
    )
    monkeypatch.setattr(doctor, "probe", lambda name: {"version": version, "devices": "cpu", "dtypes": "fp32"})
    finding = next(iter(doctor.examine_framework(SPELLINGS["mindspore"])))
    assert "only parts of its tests ran" in finding.state
    assert finding.remedy == ""


@pytest.mark.parametrize(
    ("installed", "state", "remedy"),
    [
        (None, "not found; mindspore 2.8.0 goes with 8.3, 8.5", ""),
        ("8.5.0.1", "8.5.0.1; mindspore 2.8.0 goes with 8.3, 8.5", ""),
        ("7.8.T1", "7.8.T1; mindspore 2.8.0 goes with 8.3, 8.5", "install CANN 8.5, or another mindspore"),
    ],
)
def test_cann_and_mindspore_are_a_pair(
    installed: str | None, state: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    if installed is not None:
        (tmp_path / "compiler").mkdir()
        (tmp_path / "compiler" / "version.info").write_text(f"Version={installed}\ntimestamp=20260101\n")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    finding = doctor.examine_cann("mindspore", "2.8.0", ["8.3", "8.5"])
    assert (finding.state, finding.remedy) == (state, remedy)


def test_what_is_refused_is_what_is_not_installed() -> None:
    """pyproject.toml asks pip for the same versions."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for framework in FRAMEWORKS:
        assert f'{framework.name} = ["{framework.requirement}"' in project
