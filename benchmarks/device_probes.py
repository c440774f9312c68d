"""Single operators that the table of kernels rests on, tried on the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def probes(device: str) -> dict[str, Callable[[], str | None]]:
    """Single operators that the table of kernels rests on. Each says what is wrong, or nothing."""
    import torch

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def product_into_fp32() -> str | None:
        x, target = half(64, 32), torch.ones(32, 32, device=device)
        expected = target + 0.5 * (x.float().t() @ x.float())
        torch.addmm(target, x.t(), x, out_dtype=torch.float32, beta=1.0, alpha=0.5, out=target)
        worst = float((target - expected).abs().max() / expected.abs().max())
        return None if worst < 1e-2 else f"differs by {worst:.2e}"

    def flash() -> str | None:
        from tandem.backends.torch.attention import attention, runs
        from tandem.backends.torch.compute import cuda

        lengths = [7, 1, 30, 26]
        q, k, v = (half(64, heads, 64).requires_grad_() for heads in (4, 2, 2))
        starts = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
        actual = cuda.attention(q, k, v, cuda.Documents(starts, 30, runs(lengths)))
        actual.float().square().sum().backward()
        wide = [x.detach().float().repeat_interleave(4 // x.shape[1], dim=1).requires_grad_() for x in (q, k, v)]
        expected = attention(*wide, runs(lengths))
        expected.square().sum().backward()
        assert q.grad is not None
        assert wide[0].grad is not None
        outputs = float((actual.float() - expected).abs().max() / expected.abs().max())
        gradients = float((q.grad.float() - wide[0].grad).abs().max() / wide[0].grad.abs().max())
        return None if max(outputs, gradients) < 3e-2 else f"output differs by {outputs:.2e}, gradient {gradients:.2e}"

    def skipping() -> str | None:
        weight, gradient = torch.ones(8, device=device), torch.ones(8, device=device)
        moments = [torch.zeros(8, device=device) for _ in range(2)]
        torch._fused_adamw_(
            *([weight], [gradient], [moments[0]], [moments[1]], [], [torch.ones((), device=device)]),
            lr=0.1,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=torch.ones((), device=device),
            found_inf=torch.ones((), device=device),
        )
        return None if bool((weight == 1).all()) else "found_inf did not skip the update"

    def grouped() -> str | None:
        from tandem.backends.torch.compute import cuda_experts

        x, w = half(48, 64), half(3 * 32, 64)
        groups = cuda_experts.groups(torch.tensor([16, 0, 32], device=device))
        actual = cuda_experts.grouped_product(x, w, groups)
        expected = torch.cat([x[:16] @ w[:32].t(), x[16:] @ w[64:].t()])
        worst = float((actual.float() - expected.float()).abs().max() / expected.abs().max())
        return None if worst < 2e-2 else f"differs by {worst:.2e}"

    def grouped_gradients() -> str | None:
        """The middle expert has no rows. On B200 PyTorch's product leaves what its memory held."""
        from tandem.backends.torch.compute import cuda_experts

        x, gradient = half(48, 64), half(48, 32)
        groups = cuda_experts.groups(torch.tensor([16, 0, 32], device=device))
        of_experts = [gradient[:16].t() @ x[:16], torch.zeros(32, 64, device=device), gradient[16:].t() @ x[16:]]
        expected = torch.cat([part.float() for part in of_experts])
        target = torch.full_like(expected, torch.nan)
        for first, times in ((True, 1), (False, 2)):
            half(3 * 32, 64).fill_(torch.nan)  # so that memory that is used again is seen
            cuda_experts.add_grouped_product(target, first, gradient, x, groups)
            worst = float((target / times - expected).abs().max() / expected.abs().max())
            if not worst < 2e-2:
                return f"with first={first}, differs by {worst:.2e}"
        return None

    return {
        "products added to fp32": product_into_fp32,
        "flash attention over documents": flash,
        "AdamW's found_inf": skipping,
        "grouped products": grouped,
        "gradients by grouped products": grouped_gradients,
    }
