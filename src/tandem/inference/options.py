"""Which model to ask, and on which device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem.data.templates.catalog import THINKING_MODES, check_prompt_type
from tandem.errors import UserError
from tandem.frameworks import default_framework
from tandem.models.config import ModelConfig
from tandem.models.lora import check_stated
from tandem.options import Options, PathText, flag_of, positional
from tandem.parallel.layout import Layout

# Flags that split a copy of a model over more processes.
SPLITS = (("tensor_model_parallel_size", ""), ("expert_model_parallel_size", ", where it has experts"))


@dataclass(frozen=True)
class LoadOptions(Options):
    """A model to ask."""

    load: PathText = field(metadata=positional("MODEL", flag_too=True))
    """Hugging Face folder, or a checkpoint of any layout."""
    _: KW_ONLY
    ai_framework: str = field(default_factory=default_framework)
    """Framework: torch (or pytorch), or mindspore; default: the installed one, or torch if both are installed."""
    tokenizer_name_or_path: PathText | None = None
    """Folder of the tokenizer; default: the one in the model's folder."""
    lora_load: PathText | None = None
    """Folder of adapters for the model: PEFT's, or a run's."""
    lora_r: int | None = None
    """Rank of the adapters; another one than theirs is an error."""
    lora_alpha: float | None = None
    """Their alpha, for Megatron torch files that do not record it; another one than theirs is an error."""
    lora_target_modules: tuple[str, ...] = ()
    """Their modules; others than theirs are an error."""
    raw: bool = False
    """Continue the prompt as plain text, without a chat template. It begins as the tokenizer begins texts."""
    prompt_type: str | None = None
    """Chat template; default: the one that the model was fine-tuned with, or else the tokenizer's."""
    enable_thinking: str | None = None
    """Whether the answer begins with a thought: true or false; default: as the template has it."""
    ckpt_step: int | None = None
    """Iteration to load; default: the newest."""
    device: str | None = None
    """Device: cpu, cuda or npu; default: the best one present."""
    bf16: bool = False
    """Compute in bfloat16, and keep keys and values in it."""
    fp16: bool = False
    """Compute in float16, and keep keys and values in it."""
    tensor_model_parallel_size: int = 1
    """Number of processes that split each tensor."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that split the layers."""
    expert_model_parallel_size: int = 1
    """Number of processes that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = None
    """Number of processes that split each expert: 1, or --tensor-model-parallel-size, which is the default."""
    moe_tp_extend_ep: bool = False
    """Processes that split tensors share experts, too, and do not split them."""

    def of(self, folder: str) -> LoadOptions:
        """The same for the model in another folder. Adapters and the iteration are this one's own."""
        return replace(
            self, load=folder, lora_load=None, lora_r=None, lora_alpha=None, lora_target_modules=(), ckpt_step=None
        )

    def check_adapters(self, config: ModelConfig) -> None:
        """Raise UserError, with both values, when a flag contradicts the adapters of the model."""
        given = {name: getattr(self, name) for name in ("lora_r", "lora_alpha", "lora_target_modules")}
        check_stated(config.lora, given, self.lora_load or self.load)

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            moe_tp_extend_ep=self.moe_tp_extend_ep,
        )

    @property
    def ranks_of_a_copy(self) -> int:
        """How many processes hold one copy of the model together."""
        layout = self.layout
        return layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.data_ranks_of_a_copy

    def check_processes(self, processes: int) -> None:
        """Raise UserError where one copy of the model does not take these processes, with the flags that would."""
        ranks = self.ranks_of_a_copy
        if processes == ranks:
            return
        flags = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
        flags += ["expert_model_parallel_size"] * (self.layout.data_ranks_of_a_copy > 1)
        given = " and ".join(f"{flag_of(name)} {getattr(self, name)}" for name in flags)
        advice = [f"--nproc-per-node {ranks}"]
        for name, of_experts in SPLITS:
            size = getattr(self, name) * (processes // ranks)
            if size > 1 and replace(self, **{name: size}).ranks_of_a_copy == processes:
                advice.append(f"{flag_of(name)} {size} to split the model over {processes}{of_experts}")
        raise UserError(
            f"{given}: here one copy of the model answers. It takes {ranks} process{'es' * (ranks > 1)}, and there are "
            f"{processes}. Give {', or '.join(advice)}"
        )

    def problems(self) -> Iterator[str]:
        if self.bf16 and self.fp16:
            yield "--bf16 and --fp16: give one of them"
        if self.raw and self.prompt_type is not None:
            yield f"--raw and --prompt-type {self.prompt_type}: give one of them"
        if self.enable_thinking is not None and self.enable_thinking not in THINKING_MODES:
            yield f"--enable-thinking {self.enable_thinking}: expected one of {', '.join(THINKING_MODES)}"
        if self.prompt_type is not None:
            try:
                check_prompt_type(self.prompt_type)
            except UserError as error:
                yield str(error).replace("prompt type", "--prompt-type", 1)

    @property
    def thinking(self) -> bool | None:
        """`enable_thinking` of a template."""
        return THINKING_MODES[self.enable_thinking or "none"]


def models_to_open(model: LoadOptions, compare: str | None, names: Sequence[str] = ()) -> dict[str, LoadOptions]:
    """How a model, and the one that it is compared with, are opened, by their names. The second gets no adapters.

    Args:
        names: of the models; default: those of their folders.
    """
    loads = [model]
    if compare is not None:
        loads.append(model.of(compare))
    found: dict[str, LoadOptions] = {}
    for number, load in enumerate(loads):
        found[names[number] if names else name_of(load.lora_load or load.load, found)] = load
    return found


def name_of(folder: str, taken: Mapping[str, Any] | None = None) -> str:
    """The name of a model by its folder; with `-base` where another one has it.

    >>> name_of("run/tuned/"), name_of("other/tuned", {"tuned": ...})
    ('tuned', 'tuned-base')
    """
    name = Path(os.path.abspath(folder)).name or "model"  # of a link, the name that was typed
    return f"{name}-base" if name in (taken or {}) else name
