"""What Inductor makes of fused functions for an NVIDIA device of the kind sm_90. No device is needed, but Triton.

The kernels are counted, compiled to machine code, and run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tandem.backends.torch.compute import cuda, cuda_experts
from tandem.backends.torch.compute.fused import Fused

triton = pytest.importorskip(
    "triton",
    reason="Triton, of 700 MB, is in no extra: .venv/bin/pip install triton, then make test-slow PART=jobs",
)

pytestmark = pytest.mark.slow("jobs")

TARGET = triton.backends.compiler.GPUTarget("cuda", 90, 32)
FUSED = (*cuda.FUSED, *cuda_experts.FUSED)
T, G, Q, D, H, V = 4096, 8, 4, 128, 4096, 151936  # tokens, groups, queries per group, channels, hidden, vocabulary
E, K, F = 128, 8, 768  # experts, of which a token takes some, and their inner width


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    see_hopper(monkeypatch)


def see_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch believes that an H100 is here, as far as making code goes."""
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties

    driver = SimpleNamespace(
        get_current_target=lambda: TARGET,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    limits = {
        "multi_processor_count": 132,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "warp_size": 32,
        "major": 9,
    }
    properties = DeviceProperties(type="cuda", index=0, cc=90, **limits)
    seen = SimpleNamespace(
        **limits,
        minor=0,
        total_memory=80 * 2**30,
        name="NVIDIA H100",
        L2_cache_size=50 * 2**20,
        shared_memory_per_block_optin=232448,
        gcnArchName="",
    )
    monkeypatch.setattr(DeviceProperties, "create", staticmethod(lambda device: properties))
    for name, value in (
        ("get_device_properties", seen),
        ("current_device", 0),
        ("is_available", True),
        ("get_device_capability", (9, 0)),
        ("device_count", 1),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    # The method itself asks for a device first.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: torch.ops.aten.copy_.default(self, source))


def arguments() -> dict[Fused, Callable[[], tuple[Any, ...]]]:
    """Each fused function, and tensors of an 8B layer for it."""

    def there(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def heads() -> tuple[torch.Tensor, ...]:
        return there(T, G, Q, D), there(T, G, 1, D), there(T, G, 1, D)

    def qkv() -> torch.Tensor:
        return there(T, G, Q + 2, D)

    def angles() -> tuple[torch.Tensor, torch.Tensor]:
        return there(T, 1, D // 2), there(T, 1, D // 2)

    scale = lambda: there(T, 1, dtype=torch.float32)  # noqa: E731

    def routed(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return there(T, *shape, dtype=dtype)

    def products() -> tuple[torch.Tensor, ...]:
        return there(E, 2 * F, H, dtype=torch.float32), there(E, 2 * F, H), there(E, dtype=torch.int32)

    return {
        cuda_experts.WEIGHTED_SWIGLU: lambda: (there(T * K, 2 * F), there(T * K, 1)),
        cuda_experts.WEIGHTED_SWIGLU_BACKWARD: lambda: (there(T * K, F), there(T * K, 2 * F), there(T * K, 1)),
        cuda_experts.ROUTE: lambda: (routed(E), routed(K, dtype=torch.int64), T, True),
        cuda_experts.ROUTE_BACKWARD: lambda: (
            routed(K),
            routed(E),
            routed(1),
            routed(K, dtype=torch.int64),
            there(E, dtype=torch.float32),
            there(dtype=torch.float32),
            T,
            True,
        ),
        cuda_experts.SET_PRODUCTS: products,
        cuda_experts.ADD_PRODUCTS: products,
        cuda_experts.SUM_ROWS: lambda: (there(T * K, H), routed(K, dtype=torch.int64)),
        cuda.RMS_NORM: lambda: (there(T, H), there(H), 1e-6),
        cuda.RMS_NORM_BACKWARD: lambda: (there(T, H), there(T, H), scale(), there(H)),
        cuda.SWIGLU: lambda: (there(T, 6 * H),),
        cuda.SWIGLU_BACKWARD: lambda: (there(T, 3 * H), there(T, 6 * H)),
        cuda.ROTARY_HEADS: lambda: (qkv(), *angles()),
        cuda.ROTARY_HEADS_BACKWARD: lambda: (*heads(), *angles()),
        cuda.NORMALISED_ROTARY_HEADS: lambda: (qkv(), there(D), there(D), 1e-6, *angles()),
        cuda.NORMALISED_ROTARY_HEADS_BACKWARD: lambda: (*heads(), qkv(), there(D), there(D), 1e-6, *angles()),
        cuda.LOSSES_AND_GRADIENT: lambda: (there(2048, V), there(2048, dtype=torch.int64)),
    }


def code_of(function: Callable[..., Any], given: Callable[[], tuple[Any, ...]]) -> str:
    """The Python source with Triton kernels that Inductor writes for a function."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V as inductor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = FakeTensorMode()
    with fake:
        values = given()
        tensors = [value for value in values if isinstance(value, torch.Tensor)]

        def of_tensors(*tensors: torch.Tensor) -> Any:
            rest = iter(tensors)
            return function(*(next(rest) if isinstance(value, torch.Tensor) else value for value in values))

        module = make_fx(of_tensors, decomposition_table=select_decomp_table())(*tensors)
    graph = GraphLowering(module, example_inputs=tensors, shape_env=fake.shape_env)
    with inductor.set_debug_handler(DebugContext()), inductor.set_graph_handler(graph), inductor.set_fake_mode(fake):
        graph.run(*tensors)
        code = graph.codegen()
    source = code[0] if isinstance(code, tuple) else code
    return str(getattr(source, "value", source))


def test_every_fused_function_is_tried() -> None:
    assert set(arguments()) == set(FUSED)


@pytest.mark.parametrize("fused", FUSED, ids=lambda fused: fused.function.__name__)
def test_inductor_makes_few_kernels_that_compile(fused: Fused, hopper: None, tmp_path: Path) -> None:
    source = code_of(fused.function, arguments()[fused])
    launched = re.findall(r"(triton_\w+)\.run", source)
    assert "extern_kernels." not in source
    assert 0 < len(launched) <= fused.kernels, launched
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.DOTALL)
    assert kernels
    for name, text in kernels:
        path = tmp_path / f"{name}.py"  # a file, because Triton reads a kernel's source
        path.write_text(text)
        namespace: dict[str, Any] = {"__name__": name, "__file__": str(path)}
        exec(compile(text, str(path), "exec"), namespace)
        assert compiled(namespace[name]).asm["cubin"], name


def test_kernels_give_what_their_functions_give_step_by_step() -> None:
    """In Triton's interpreter, on tensors of the CPU, in fp32."""
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {fused.function.__name__ for fused in FUSED}
    assert {name: largest for name, largest in found.items() if not largest < 1e-6} == {}


def compiled(kernel: Any) -> Any:
    """A kernel as Inductor wrote it, compiled by Triton in the first of the ways that it would try."""
    choice = kernel.configs[0]
    constants = {**kernel.triton_meta["constants"], **choice.kwargs}
    source = triton.compiler.ASTSource(kernel.fn, kernel.triton_meta["signature"], constants)
    return triton.compile(source, target=TARGET, options={"num_warps": choice.num_warps})
