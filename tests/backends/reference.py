"""The reference that engines are held against: Hugging Face's model with the same weights, one call per document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import transformers
from toy_work import (
    MemorySource,
    any_weights,
    assert_close_gradients,
    mean_gradients,
    mean_step,
    snapshot,
    toy_batch,
    toy_samples,
    toy_weights,
    untrained,
)

from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import IGNORE, MicroBatch
from tandem.models.hf_config import to_hf
from tandem.models.tensors import tensor_table
from tandem.models.weight_map import WeightMap

# Tests in one process take all from here; ranks of jobs need no transformers.
__all__ = [
    "MemorySource",
    "Reference",
    "any_weights",
    "assert_close_gradients",
    "mean_gradients",
    "mean_step",
    "snapshot",
    "toy_batch",
    "toy_samples",
    "toy_weights",
    "untrained",
]


class Reference:
    """Hugging Face's model in fp32, with global Megatron-core tensors going in and coming out."""

    def __init__(self, source: TensorSource) -> None:
        self.config = source.config
        self.weight_map = WeightMap(source.config)
        hf_config = transformers.AutoConfig.for_model(**to_hf(source.config, dtype="float32"))
        self.model = transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").float()
        state = {
            hf_name: torch.from_numpy(np.array(part))
            for name in tensor_table(source.config)
            for hf_name, part in self._to_hf(name, source.read(name)).items()
        }
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= ({"lm_head.weight"} if source.config.tied else set())

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """[t, vocabulary], each document in a call of its own."""
        return torch.cat(
            [
                self.model(
                    input_ids=torch.from_numpy(batch.tokens[start:stop]).long()[None],
                    position_ids=torch.from_numpy(batch.position_ids[start:stop]).long()[None],
                ).logits[0]
                for start, stop in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:])
            ]
        )

    def loss(self, batches: Sequence[MicroBatch], weights: Sequence[np.ndarray] | None = None) -> torch.Tensor:
        """The sum of weight * -log p(label); without weights the mean over the trained tokens of all batches."""
        logits = torch.cat([self.logits(batch) for batch in batches])
        labels = torch.from_numpy(np.concatenate([batch.labels for batch in batches])).long()
        if weights is None:
            return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return torch.sum(losses * torch.from_numpy(np.concatenate(weights)))

    def loss_and_gradients(
        self, batches: Sequence[MicroBatch], weights: Sequence[np.ndarray] | None = None
    ) -> tuple[float, dict[str, np.ndarray]]:
        self.model.zero_grad()
        loss = self.loss(batches, weights)
        loss.backward()
        gradients = {name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None}
        return loss.item(), self._to_mcore(gradients)

    def weights(self) -> dict[str, np.ndarray]:
        return self._to_mcore({name: p.detach().numpy() for name, p in self.model.named_parameters()})

    def _to_hf(self, name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters that a tensor is made of. In memory, transformers 5 stacks experts, too, in 3 dimensions."""
        if stack := self._stack(name):
            return {stack: tensor.reshape(self.config.experts.num_experts, -1, tensor.shape[1])}
        return self.weight_map.to_hf(name, tensor)

    def _stack(self, name: str) -> str | None:
        prefix, _, linear = name.partition(".mlp.experts.")
        parameter = {"linear_fc1.weight": "gate_up_proj", "linear_fc2.weight": "down_proj"}.get(linear)
        return f"{prefix.replace('decoder', 'model')}.mlp.experts.{parameter}" if parameter else None

    def _to_mcore(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        def of(name: str, parts: Iterable[str]) -> np.ndarray:
            if stack := self._stack(name):
                return tensors[stack].reshape(-1, tensors[stack].shape[2])
            return self.weight_map.to_mcore(name, [tensors[part] for part in parts])

        return {name: of(name, parts) for name, parts in self.weight_map.rows.items()}
