"""What `tandem bench` measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.bench.layouts import check_layouts
from tandem.frameworks import default_framework
from tandem.models.config import ModelConfig
from tandem.models.published import qwen3_config
from tandem.options import Options, PathText


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """A benchmark of the devices of one machine. It needs no data and no weights."""

    ai_framework: str = field(default_factory=default_framework)
    """Framework: torch (or pytorch), or mindspore; default: the installed one, or torch if both are installed."""
    device: str | None = None
    """Device: cpu, cuda or npu; default: the best one present."""
    sizes: tuple[str, ...] = ("0.6B",)
    """Qwen3 sizes to train, with random weights."""
    layouts: tuple[str, ...] = ()
    """Layouts to train in: dp1 is one process, tp2-dp4-sp-distopt eight with two tensor ranks. Parts: tp, pp, dp and
    ep with a number, sp, distopt, overlap and fsdp2. Default: one process, and on several devices all as data ranks,
    all as tensor ranks, and two tensor ranks with the rest as data ranks."""
    num_layers: int | None = None
    """Layers to keep of each size; default: all."""
    seq_length: int = 4096
    """Tokens of a sample."""
    micro_batch_sizes: tuple[int, ...] = (1, 4)
    """Samples of a micro-batch."""
    documents: int = 200
    """Documents of a packed sample, in the stage that packs. New lengths come with each step."""
    steps: int = 5
    """Steps to measure, after two that are not."""
    bf16: bool = True
    """Compute in bfloat16 where the device does."""
    stage_seconds: int = 300
    """Most time for one stage. What takes longer is stopped, and the next stage begins."""
    output: PathText = "bench.json"
    """File for the results. The page gets the same name with .html."""

    def problems(self) -> Iterator[str]:
        for name in ("seq_length", "documents", "steps", "stage_seconds"):
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more"
        if self.num_layers is not None and self.num_layers < 1:
            yield f"--num-layers {self.num_layers}: expected 1 or more"
        if any(size < 1 for size in self.micro_batch_sizes):
            yield f"--micro-batch-sizes {' '.join(map(str, self.micro_batch_sizes))}: expected 1 or more each"
        if self.documents > self.seq_length:
            yield f"--documents {self.documents}: expected at most --seq-length {self.seq_length}"
        if not self.output.endswith(".json"):
            yield f"--output {self.output}: expected a name that ends with .json"
        if twice := sorted({name for name in self.layouts if self.layouts.count(name) > 1}):
            yield f"--layouts {' '.join(self.layouts)}: {' and '.join(twice)} given twice"
        check_layouts(self.layouts, self.configs, self.ai_framework)  # raises, also for a size that does not exist

    @property
    def configs(self) -> dict[str, ModelConfig]:
        """The model of each size."""
        return {size: self.config(size) for size in self.sizes}

    def config(self, size: str) -> ModelConfig:
        config = qwen3_config(size)
        return config if self.num_layers is None else dataclasses.replace(config, num_layers=self.num_layers)
