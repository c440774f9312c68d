"""Facts about PyTorch and MindSpore that need no import of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.errors import UserError, nearest

FIRST_TRANSFORMERS = (4, 51)  # the first version that has Qwen3
GRADIENT_PIECE = 2**20  # numbers of a weight's gradient that PyTorch's backend forms at a time, on a CPU
ANY_VERSION = "TANDEM_ANY_VERSION"  # environment variable: accept versions that Tandem was not tested with


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework, and what its backend can do.

    Attributes:
        name: on PyPI, under `tandem.backends`, and for `--ai-framework`.
        first_version: the first version that works, as in pyproject.toml.
        tested_version: the first version without a notice. With older ones only parts of the tests ran.
        untested_version: the first version that Tandem was not tested with, as in pyproject.toml.
        launcher: the program that starts its processes.
        devices: what `--device` may name, best first.
        shards_weights: supports `--use-torch-fsdp2`.
        logits_chunk_bytes: largest size of the fp32 logits of one chunk of rows in the loss, on a CPU.
        device_logits_chunk_bytes: the same on an accelerator. Where few large products matter, it is 2,208 rows of
            Qwen3's vocabulary; on a CPU, memory that is used again matters.
        device_logits_bytes: of each number of such a chunk, where weights are in half precision: the loss holds the
            logits and their gradient in the weights' dtype, or two tensors in fp32.
        adds_gradients_in_place: new gradients of a weight are added to the old ones directly, without a new tensor.
        narrow_moments: can keep Adam's moments in bfloat16.
        few_shapes: environment variables with which it keeps kernels for a few shapes only, read when it is imported.
            Each number of tokens has shapes of its own, and answers come to thousands.
        device_plugin: how to fix it when the framework does not see Ascend devices.
    """

    name: str
    first_version: tuple[int, ...]
    tested_version: tuple[int, ...]
    untested_version: tuple[int, ...]
    launcher: str
    devices: tuple[str, ...]
    shards_weights: bool
    logits_chunk_bytes: int
    device_logits_chunk_bytes: int
    device_logits_bytes: int
    adds_gradients_in_place: bool
    narrow_moments: bool
    device_plugin: str
    few_shapes: tuple[tuple[str, str], ...] = ()

    def keep_few_shapes(self) -> None:
        """Let it keep little for shapes that came once, unless the user's environment says how much."""
        for name, value in self.few_shapes:
            os.environ.setdefault(name, value)

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def requirement(self) -> str:
        """The name and the versions that work, in the form that pip reads."""
        first, end = (".".join(map(str, version)) for version in (self.first_version, self.untested_version))
        return f"{self.name}>={first},<{end}"

    def check(self, *, shards_weights: bool, narrow_moments: Iterable[str] = ()) -> None:
        """Raise UserError when the settings need a feature that this framework does not have.

        Args:
            narrow_moments: the flags that ask for moments in another dtype than fp32.
        """
        features = {
            "--use-torch-fsdp2": (shards_weights, [one.name for one in FRAMEWORKS if one.shards_weights]),
            **dict.fromkeys(narrow_moments, (True, [one.name for one in FRAMEWORKS if one.narrow_moments])),
        }
        for flag, (is_needed, supporting) in features.items():
            if is_needed and self.name not in supporting:
                raise UserError(
                    f"{flag} needs {' or '.join(supporting)}, not {self.name}: leave it out, or use --ai-framework "
                    f"{supporting[0]}"
                )

    def check_device(self, device: str | None) -> None:
        """Raise UserError when the backend of this framework never computes on such a device; None is the best one."""
        if device is None or device in self.devices:
            return
        others = [f"--ai-framework {one.name}" for one in FRAMEWORKS if device in one.devices]
        raise UserError(
            f"--device {device}: {self.name} computes on {', '.join(self.devices)}: give one of them"
            f"{''.join(f', or {other}' for other in others)}"
        )

    def version_remedy(self) -> str | None:
        """What to do about an installed version that Tandem was not tested with; None when there is nothing to do."""
        version, numbers = self._installed()
        if version is None or self.first_version <= numbers < self.untested_version:
            return None
        if os.environ.get(ANY_VERSION) == "1":
            return None
        return f"pip install '{self.requirement}', or try {self.name} {version} with {ANY_VERSION}=1"

    def version_notice(self) -> str | None:
        """What a user should know of an installed version that works, but is less tested than newer ones."""
        version, numbers = self._installed()
        if version is None or not self.first_version <= numbers < self.tested_version:
            return None
        tested = ".".join(map(str, self.tested_version))
        return (
            f"{self.name} {version}: Tandem is made for {tested} and newer; with this one only parts of its tests ran"
        )

    def _installed(self) -> tuple[str | None, tuple[int, ...]]:
        """The installed version and its first two numbers; None where it is not known, as when built from source."""
        try:
            version = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None, ()
        return version, tuple(map(int, re.findall(r"\d+", version)[:2]))


TORCH = Framework(
    name="torch",
    first_version=(2, 6),
    tested_version=(2, 6),
    untested_version=(3,),
    launcher="torchrun",
    devices=("npu", "cuda", "cpu"),
    shards_weights=True,
    logits_chunk_bytes=64 * 2**20,
    device_logits_chunk_bytes=5 * 2**28,
    device_logits_bytes=4,
    adds_gradients_in_place=True,
    narrow_moments=True,
    device_plugin="pip install torch_npu",
    few_shapes=(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16"), ("LRU_CACHE_CAPACITY", "16")),
)
MINDSPORE = Framework(
    name="mindspore",
    first_version=(2, 7),
    tested_version=(2, 9),
    untested_version=(2, 11),
    launcher="msrun",
    devices=("npu", "cpu"),
    shards_weights=False,
    logits_chunk_bytes=128 * 2**20,
    device_logits_chunk_bytes=5 * 2**28,
    device_logits_bytes=8,
    adds_gradients_in_place=False,
    narrow_moments=False,
    device_plugin="install CANN",
)
FRAMEWORKS = (TORCH, MINDSPORE)  # the first one that is installed is the default
SPELLINGS = {framework.name: framework for framework in FRAMEWORKS} | {"pytorch": TORCH}


def installed_frameworks() -> list[Framework]:
    """The frameworks that can be imported here, in the order of FRAMEWORKS."""
    return [framework for framework in FRAMEWORKS if framework.is_installed]


def default_framework() -> str:
    """The name of the installed framework; PyTorch when both are installed, or none."""
    return next(iter(installed_frameworks()), TORCH).name


def has_transformers() -> bool:
    """Whether Hugging Face's own models can be run here, Qwen3 among them."""
    if not TORCH.is_installed or importlib.util.find_spec("transformers") is None:
        return False
    numbers = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("transformers"))[:2]))
    return numbers >= FIRST_TRANSFORMERS


def named_framework(ai_framework: str) -> Framework:
    """The framework that `--ai-framework` names.

    >>> named_framework("pytorch").name
    'torch'

    Raises:
        UserError: the name is unknown. The error suggests the nearest valid one.
    """
    if ai_framework not in SPELLINGS:
        names = list(SPELLINGS)
        raise UserError(f"--ai-framework {ai_framework!r}: expected one of {names}{nearest(ai_framework, names)}")
    return SPELLINGS[ai_framework]


def check_framework(ai_framework: str) -> Framework:
    """The framework that `--ai-framework` names, after checking that it can be used here.

    Raises:
        UserError: the name is unknown, or the framework is not installed, or Tandem was not tested with its version.
    """
    framework = named_framework(ai_framework)
    if not framework.is_installed:
        raise UserError(
            f"--ai-framework {ai_framework}: {framework.name} is not installed; "
            f"pip install 'tandem-llm[{framework.name}]'"
        )
    if remedy := framework.version_remedy():
        raise UserError(
            f"--ai-framework {ai_framework}: Tandem was not tested with this version of {framework.name}: {remedy}"
        )
    return framework
