"""What a plan is made for: a model, how it is spread over ranks, and the batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from tandem.errors import UserError
from tandem.frameworks import Framework, named_framework
from tandem.models.config import ModelConfig
from tandem.moments import MomentSettings
from tandem.options import Describe, as_typed
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout, Stages

# Of each stage that compares answers: how many sequences of a sample are trained, and how many are scored before that.
DOCUMENTS: dict[str | None, tuple[int, int]] = {"dpo": (2, 2), "orpo": (2, 2), "simpo": (2, 2), "kto": (1, 2)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of a training run that its memory and its speed depend on. Field names are Megatron's.

    Attributes:
        recompute_layers: how many of a rank's layers, from the first, keep only their input for the backward pass.
        stage: of post-training, where it is one that compares answers.
        moments: Adam's.
        half: compute in bfloat16 or float16 with fp32 masters; otherwise everything is fp32.
    """

    config: ModelConfig
    layout: Layout = field(default_factory=Layout)
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    use_torch_fsdp2: bool = False
    micro_batch_size: int = 1
    global_batch_size: int = 1
    seq_length: int = 4096
    recompute_layers: int = 0
    stage: str | None = None
    half: bool = False
    moments: MomentSettings = field(default_factory=MomentSettings)
    ai_framework: str = "torch"

    @property
    def framework(self) -> Framework:
        return named_framework(self.ai_framework)

    @property
    def tensor_size(self) -> int:
        return self.layout.tensor_model_parallel_size

    @property
    def pipeline_size(self) -> int:
        return self.layout.pipeline_model_parallel_size

    @property
    def devices(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_parallel_size

    @property
    def fully_sharded(self) -> bool:
        """Whether a data rank keeps only its rows of weights and gradients."""
        return self.use_torch_fsdp2 and self.data_parallel_size > 1

    @property
    def optimizer_split(self) -> int:
        """The number of parts that data ranks split the optimizer's state into."""
        return self.data_parallel_size if self.use_distributed_optimizer or self.use_torch_fsdp2 else 1

    @property
    def layers_of_stages(self) -> list[int]:
        return [sum(len(chunk) for chunk in stage) for stage in _stages(self.layout, self.config.num_layers)]

    @property
    def chunks(self) -> int:
        """Virtual stages of each pipeline stage; 1 when they are not interleaved."""
        return len(_stages(self.layout, self.config.num_layers)[0])

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, on each data-parallel rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def documents(self) -> int:
        """Sequences of a sample that are trained."""
        return DOCUMENTS.get(self.stage, (1, 0))[0]

    @property
    def scored_documents(self) -> int:
        """Sequences of a sample of which each step first computes the log-probabilities."""
        return DOCUMENTS.get(self.stage, (1, 0))[1]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length * self.documents

    @property
    def sequence_split(self) -> int:
        """The number of parts that tensor ranks split the tokens into between the tensor-parallel regions."""
        return self.tensor_size if self.sequence_parallel else 1

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in the weights that compute, and in activations."""
        return 2 if self.half else 4

    def check(self, describe: Describe = as_typed) -> None:
        """Raise UserError when sizes do not divide, or exceed what the model has.

        Args:
            describe: how errors call the fields of the layout.
        """
        self.layout.check(self.config, describe)
        self.layout.check_expert_sharding(self.use_torch_fsdp2)
        Grid(self.layout, self.devices)  # raises where ranks cannot share experts so
        whole = self.micro_batch_size * self.data_parallel_size
        if self.global_batch_size % whole:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x {self.data_parallel_size} data-parallel ranks = {whole}"
            )
        if self.seq_length > self.config.max_position_embeddings:
            raise UserError(
                f"--seq-length {self.seq_length} is above the model's max_position_embeddings "
                f"{self.config.max_position_embeddings}"
            )
        self.framework.check(shards_weights=self.use_torch_fsdp2, narrow_moments=self.moments.narrow_moments)
        if self.chunks > 1 and self.micro_batches % self.pipeline_size:
            raise UserError(
                f"interleaved stages need a multiple of --pipeline-model-parallel-size {self.pipeline_size} "
                f"micro-batches, and a step has {self.micro_batches}"
            )


@lru_cache(maxsize=256)
def _stages(layout: Layout, num_layers: int) -> Stages:
    return layout.stages(num_layers)
