"""What is known of PyTorch and MindSpore without importing them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass

from tandem.errors import UserError, nearest

ANY_VERSION = "TANDEM_ANY_VERSION"  # environment variable: take versions that were never tried


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework, and what its backend can do.

    Attributes:
        name: on PyPI, of the package under `tandem.backends`, and for `--ai-framework`.
        first_version, untried_version: as in pyproject.toml: the first that works, and the first that nobody has tried.
        launcher: the program that starts its processes.
        interleaves_stages: runs several chunks of layers on one pipeline stage.
        shards_weights: runs `--use-torch-fsdp2`.
        logits_chunk_bytes: how large the fp32 logits of one chunk of rows may be in the loss, on a CPU.
        adds_gradients_in_place: a weight's gradient is added where the last one is; otherwise it is a new tensor first.
        device_plugin: what to install where Ascend devices are not seen.
    """

    name: str
    first_version: tuple[int, ...]
    untried_version: tuple[int, ...]
    launcher: str
    interleaves_stages: bool
    shards_weights: bool
    logits_chunk_bytes: int
    adds_gradients_in_place: bool
    device_plugin: str

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        first, beyond = (".".join(map(str, version)) for version in (self.first_version, self.untried_version))
        return f"{self.name}>={first},<{beyond}"

    def check(self, *, shards_weights: bool, interleaves_stages: bool) -> None:
        """Raise UserError when this framework is to do what only another one does."""
        wanted = {
            "--use-torch-fsdp2": (shards_weights, [one.name for one in FRAMEWORKS if one.shards_weights]),
            "--num-layers-per-virtual-pipeline-stage": (
                interleaves_stages,
                [one.name for one in FRAMEWORKS if one.interleaves_stages],
            ),
        }
        for flag, (is_wanted, able) in wanted.items():
            if is_wanted and self.name not in able:
                raise UserError(
                    f"{flag} runs on {' or '.join(able)} only, not on {self.name}; leave it out, or take "
                    f"--ai-framework {able[0]}"
                )

    def untried(self) -> str | None:
        """Why the installed version is refused, and what to do; None when it is not refused."""
        try:
            version = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None  # built from source, or under another name: nothing is known of it
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if self.first_version <= numbers < self.untried_version or os.environ.get(ANY_VERSION) == "1":
            return None
        return f"pip install '{self.requirement}', or try {self.name} {version} with {ANY_VERSION}=1"


TORCH = Framework(
    name="torch",
    first_version=(2, 6),
    untried_version=(3,),
    launcher="torchrun",
    interleaves_stages=True,
    shards_weights=True,
    logits_chunk_bytes=64 * 2**20,
    adds_gradients_in_place=True,
    device_plugin="pip install torch_npu",
)
MINDSPORE = Framework(
    name="mindspore",
    first_version=(2, 9),
    untried_version=(2, 11),
    launcher="msrun",
    interleaves_stages=False,
    shards_weights=False,
    logits_chunk_bytes=128 * 2**20,
    adds_gradients_in_place=False,
    device_plugin="install CANN",
)
FRAMEWORKS = (TORCH, MINDSPORE)  # the first one that is installed is the default
SPELLINGS = {framework.name: framework for framework in FRAMEWORKS} | {"pytorch": TORCH}


def installed_frameworks() -> list[Framework]:
    """Those that can be imported here, in the order of FRAMEWORKS."""
    return [framework for framework in FRAMEWORKS if framework.is_installed]


def default_framework() -> str:
    """The name of the framework that is installed, PyTorch where both are or neither is."""
    return next(iter(installed_frameworks()), TORCH).name


def has_transformers() -> bool:
    """Whether Hugging Face's own models can be run here."""
    return TORCH.is_installed and importlib.util.find_spec("transformers") is not None


def named_framework(ai_framework: str) -> Framework:
    """The framework that `--ai-framework` names.

    Raises:
        UserError: the name is unknown; the nearest valid one is given.
    """
    if ai_framework not in SPELLINGS:
        names = list(SPELLINGS)
        raise UserError(f"--ai-framework {ai_framework!r}: expected one of {names}{nearest(ai_framework, names)}")
    return SPELLINGS[ai_framework]


def check_framework(ai_framework: str) -> Framework:
    """The framework that `--ai-framework` names, which can be used here.

    Raises:
        UserError: the name is unknown, or the framework is not installed, or in a version that was never tried.
    """
    framework = named_framework(ai_framework)
    if not framework.is_installed:
        raise UserError(
            f"--ai-framework {ai_framework}: {framework.name} is not installed; "
            f"pip install 'tandem-llm[{framework.name}]'"
        )
    if remedy := framework.untried():
        raise UserError(
            f"--ai-framework {ai_framework}: this version of {framework.name} was never tried here: {remedy}"
        )
    return framework
