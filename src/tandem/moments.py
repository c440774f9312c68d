"""The dtypes that Adam's moments are kept in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class MomentSettings:
    """Adam's moments, as training and plans take them."""

    use_precision_aware_optimizer: bool = False
    """Allow other dtypes than fp32 for Adam's moments (PyTorch only). The update is computed in fp32."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """With --use-precision-aware-optimizer: dtype that Adam's first moment is kept in."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """With --use-precision-aware-optimizer: dtype that Adam's second moment is kept in. bf16 wants a smaller
    --adam-beta2 than the default, such as 0.95."""

    @property
    def moment_bytes(self) -> int:
        """Of both moments of a number."""
        return BYTES[self.exp_avg_dtype] + BYTES[self.exp_avg_sq_dtype]

    @property
    def narrow_moments(self) -> dict[str, str]:
        """The flags that ask for another dtype than fp32, with their values."""
        dtypes = {"--exp-avg-dtype": self.exp_avg_dtype, "--exp-avg-sq-dtype": self.exp_avg_sq_dtype}
        return {flag: dtype for flag, dtype in dtypes.items() if dtype != "fp32"}

    def wrong_moments(self) -> Iterator[str]:
        """What is wrong with the settings."""
        if self.narrow_moments and not self.use_precision_aware_optimizer:
            given = " ".join(f"{flag} {dtype}" for flag, dtype in self.narrow_moments.items())
            yield f"{given}: needs --use-precision-aware-optimizer, as in Megatron"
