"""Running the example scripts as a user does: in a folder of one's own, told by environment variables alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tandem.cli.settings import parse_settings
from tandem.config.checks import check_settings
from tandem.config.settings import Settings
from tandem.launch.machines import free_port

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
HF2MCORE = "mindspore/qwen3/ckpt_convert_qwen3_hf2mcore.sh"
MCORE2HF = "mindspore/qwen3/ckpt_convert_qwen3_mcore2hf.sh"
TEXT = "mindspore/qwen3/data_convert_qwen3_pretrain.sh"
INSTRUCTIONS = "mindspore/qwen3/data_convert_qwen3_instruction.sh"
FRAMEWORKS = {"mindspore": "ms", "torch": "ptd"}  # folder, and how its scripts end
SIZES = {"0point6b": "0.6B", "1point7b": "1.7B", "4b": "4B", "8b": "8B", "14b": "14B", "32b": "32B"}


def training_script(command: str, size: str, framework: str) -> str:
    """The script of a size, under the name that it has in a framework's folder."""
    name = {
        "pretrain": f"pretrain_qwen3_{size}_4K",
        "finetune": f"tune_qwen3_{size}_4K_full",
        "lora": f"tune_qwen3_{size}_4K_lora",
        "dpo": f"dpo_qwen3_{size}_4K_full",
    }[command]
    return f"{framework}/qwen3/{name}_{FRAMEWORKS[framework]}.sh"


PRETRAIN = {framework: training_script("pretrain", "0point6b", framework) for framework in FRAMEWORKS}
TUNE = {framework: training_script("finetune", "0point6b", framework) for framework in FRAMEWORKS}
# the scripts' default paths
HF, MCORE = "model_from_hf/qwen3_hf", "model_weights/qwen3_mcore"
PRETRAINED, TUNED = "ckpt/qwen3-0point6b", "ckpt/qwen3-0point6b_tune"

LINE = re.compile(
    r" iteration +\d+/ +\d+ \| consumed samples: .* \| lm loss: (\d\.\d{6}E[+-]\d\d) \| loss scale: 1\.0 "
)
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (\S+)")


@dataclass(frozen=True)
class Site:
    """A folder in which the scripts run."""

    root: Path

    def run(self, script: str, *, launchers: Path | None = None, **variables: object) -> Finished:
        """Run a script with the tests' Python; `launchers` is a folder with another msrun and torchrun."""
        folders = [*([str(launchers)] if launchers else []), str(Path(sys.executable).parent), os.environ["PATH"]]
        done = subprocess.run(
            ["bash", str(EXAMPLES / script)],
            cwd=self.root,
            env={
                **os.environ,
                "PATH": os.pathsep.join(folders),
                **{name: str(value) for name, value in variables.items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3600,
            check=False,
        )
        return Finished(done.returncode, done.stdout)

    def succeed(self, script: str, **variables: object) -> Finished:
        done = self.run(script, **variables)
        assert done.code == 0, done.output
        return done

    def train(self, script: str, **variables: object) -> Finished:
        """Run a training script on a free port."""
        return self.succeed(script, MASTER_PORT=free_port("127.0.0.1"), **variables)


@dataclass(frozen=True)
class Finished:
    """A script's exit code and all that it printed."""

    code: int
    output: str

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss in LINE.findall(self.output)]

    @property
    def saved(self) -> list[tuple[int, Path]]:
        """Iteration and folder of each checkpoint."""
        return [(int(iteration), Path(folder)) for iteration, folder in SAVED.findall(self.output)]

    @property
    def last_line(self) -> str:
        return self.output.splitlines()[-1]

    @property
    def command(self) -> list[str]:
        """The words behind `tandem`, where the launchers only printed them."""
        assert self.code == 0, self.output
        words = self.output.splitlines()
        return words[words.index("tandem") + 1 :]

    @property
    def settings(self) -> Settings:
        """Those of the training command that the launchers printed."""
        command, *words = self.command
        settings, notices = parse_settings(command, "", words)
        check_settings(settings)
        assert notices == []
        return settings
