"""The options of planning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Literal

from tandem.errors import UserError
from tandem.frameworks import SPELLINGS, default_framework
from tandem.models.config import ModelConfig
from tandem.models.hf_config import from_hf, load_hf_config
from tandem.models.lora import Lora, as_targets
from tandem.models.published import QWEN3_MOE_SIZES, QWEN3_SIZES, qwen3_config
from tandem.moments import MomentSettings
from tandem.options import Options, PathText, flag_of, options_of, positional
from tandem.parallel.layout import Layout, parse_layers
from tandem.planning.hardware import HARDWARE, Hardware
from tandem.planning.job import Job

# options that `--devices` chooses
CHOSEN = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
    "num_layer_list",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "moe_tp_extend_ep",
    "data_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "use_torch_fsdp2",
    "micro_batch_size",
    "recompute_num_layers",
)


@dataclass(frozen=True)
class PlanOptions(MomentSettings, Options):
    """Options of `tandem plan`. Those that training also has mean the same."""

    model: PathText = field(metadata=positional("MODEL", flag_too=True, also=("--load",)))
    """Hugging Face folder, or a published model such as qwen3-8B."""
    _: KW_ONLY
    hardware: Literal[
        "h100",
        "h100-pcie",
        "h100-nvl",
        "h200",
        "h20",
        "a100",
        "b200",
        "rtx4090",
        "910b1",
        "910b",
        "910b3",
        "910b4",
        "a3",
        "cpu",
    ] = "h100"
    """Device to plan for: h100, h100-pcie, h100-nvl, h200, h20, a100, b200, rtx4090, 910b (910B2), 910b1, 910b3, 910b4,
    a3 (one die of an Atlas 900 A3), or cpu."""
    devices: int | None = None
    """Suggest layouts for this number of devices; not with options that fix the layout."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each tensor."""
    pipeline_model_parallel_size: int = 1
    """Stages of layers."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk, for interleaved stages."""
    num_layer_list: str | None = None
    """Layers of each stage, such as 10,18."""
    data_parallel_size: int = 1
    """Ranks that share a global batch."""
    expert_model_parallel_size: int = 1
    """Ranks, of those of a stage, that share the experts of a layer."""
    expert_tensor_parallel_size: int | None = None
    """Tensor ranks that cut each expert: 1, or all of them, which is the default."""
    moe_tp_extend_ep: bool = False
    """Tensor ranks share experts, too, in place of cutting them."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    use_torch_fsdp2: bool = False
    """Shard weights and gradients over data-parallel ranks, too (PyTorch only)."""
    micro_batch_size: int = 1
    """Samples of one forward pass."""
    recompute_num_layers: int = 0
    """Layers of a rank, from the first, that keep only their input (in training, with --recompute-granularity full and
    --recompute-method block)."""
    global_batch_size: int | None = None
    """Samples of one step; default: one micro-batch on each data-parallel rank. Needed with --devices."""
    seq_length: int = 4096
    """Tokens of a sample."""
    stage: Literal["sft", "dpo", "orpo", "simpo", "kto"] | None = None
    """Stage of post-training. With dpo, orpo and simpo a sample is a pair of sequences of --seq-length tokens."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 masters."""
    fp16: bool = False
    """Compute in float16 with fp32 masters and a loss scale: as large and as fast as bfloat16."""
    lora_target_modules: tuple[str, ...] = ()
    """Train adapters on these modules, instead of the weights."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_use_dora: bool = False
    """Also train the length of each row of the weights."""
    ai_framework: str = field(default_factory=default_framework)
    """Framework: mindspore, or torch; default: the one that is installed, torch where both are."""
    efficiency: float | None = None
    """Share of the device's peak that matrix products reach; default: the device's assumption."""

    def problems(self) -> Iterator[str]:
        for name, value in vars(self).items():
            least = 0 if name == "recompute_num_layers" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                yield f"{flag_of(name)} {value}: expected {least} or more"
        if self.ai_framework not in SPELLINGS:
            yield f"--ai-framework {self.ai_framework}: expected one of {', '.join(SPELLINGS)}"
        if self.bf16 and self.fp16:
            yield "--fp16 and --bf16 exclude each other: give one"
        yield from self.wrong_moments()
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            yield f"--efficiency {self.efficiency}: expected a share of the peak, above 0 and at most 1"
        if self.devices is not None:
            yield from self._wrong_with_devices()

    def _wrong_with_devices(self) -> Iterator[str]:
        defaults = options_of(PlanOptions)
        fixed = [flag_of(name) for name in CHOSEN if getattr(self, name) != defaults[name].default]
        if fixed:
            yield f"--devices chooses the layout, and {' '.join(fixed)} fixes it: give one or the other"
        if self.global_batch_size is None:
            yield "--devices needs --global-batch-size: how many samples the devices share in a step"

    @property
    def device(self) -> Hardware:
        """The hardware to plan for, with the efficiency that was given."""
        hardware = HARDWARE[self.hardware]
        return hardware if self.efficiency is None else replace(hardware, efficiency=self.efficiency)

    def job(self) -> Job:
        """The job that the options describe; with `devices`, what its layouts have in common.

        Raises:
            UserError: the model is unknown.
        """
        layout = Layout(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            num_layer_list=parse_layers("--num-layer-list", self.num_layer_list),
            expert_model_parallel_size=self.expert_model_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            moe_tp_extend_ep=self.moe_tp_extend_ep,
        )
        config = with_adapters(model_config(self.model), self.lora_target_modules, self.lora_r, self.lora_use_dora)
        return Job(
            config=config,
            layout=layout.balanced(config.num_layers),
            data_parallel_size=self.data_parallel_size,
            sequence_parallel=self.sequence_parallel,
            use_distributed_optimizer=self.use_distributed_optimizer,
            use_torch_fsdp2=self.use_torch_fsdp2,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size or self.micro_batch_size * self.data_parallel_size,
            seq_length=self.seq_length,
            recompute_layers=self.recompute_num_layers,
            stage=self.stage,
            half=self.bf16 or self.fp16,
            moments=self,
            ai_framework=self.ai_framework,
        )


def with_adapters(config: ModelConfig, modules: tuple[str, ...], r: int, use_dora: bool) -> ModelConfig:
    """`config` with adapters on these modules; `config` itself without modules."""
    if not modules:
        return config
    return replace(config, lora=Lora.of_flags(r=r, target_modules=as_targets(modules), use_dora=use_dora))


def model_config(model: str) -> ModelConfig:
    """The shape of a model: from a Hugging Face folder, or of a published model.

    >>> model_config("qwen3-0.6b").num_layers
    28
    """
    if Path(model).is_dir():
        return from_hf(load_hf_config(model), f"{model}/config.json")
    family, _, size = model.partition("-")
    if family.lower() != "qwen3":
        published = ", ".join(f"qwen3-{size}" for size in (*QWEN3_SIZES, *QWEN3_MOE_SIZES))
        raise UserError(f"{model}: neither a folder nor a published model; published: {published}")
    return qwen3_config(size.upper())
