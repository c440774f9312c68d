"""A stand-in for MindSpore on an Ascend device, in NumPy: what its operators give, and how often each is called.

Operators check what they are called with as their documentation asks. `test_ascend_kernels.py` compares their names and
parameters with the MindSpore that is installed. Numbers of 16 bits keep the digits of fp32.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import fake_tensor as tensors
import numpy as np
from fake_collectives import FUNCTIONS, JOB, WORLD, AllReduce
from fake_operators import OPERATORS, MatMul, gmm, swiglu
from fake_tensor import DTYPES, RECORD, DType, Record, Tensor, log_softmax, vector_norm

__all__ = ["MINT", "OPERATORS", "RECORD", "Record", "gmm", "modules"]

MINT = {
    "zeros": tensors.zeros,
    "ones": tensors.ones,
    "ones_like": tensors.ones_like,
    "full": tensors.full,
    "empty": tensors.empty,
    "cat": tensors.cat,
    "index_select": tensors.index_select,
    "index_add": tensors.index_add,
    "triu": tensors.triu,
    "gather": tensors.gather,
    "sum": tensors.mint_sum,
    "softmax": tensors.softmax,
    "logsumexp": tensors.logsumexp,
    "transpose": tensors.transpose,
    "arange": tensors.arange,
    "topk": tensors.topk,
    "sort": tensors.sort,
    "searchsorted": tensors.searchsorted,
    "cumsum": tensors.cumsum,
    "floor_divide": tensors.floor_divide,
    "remainder": tensors.remainder,
    "less": tensors.less,
    "scatter": tensors.scatter,
    "max": tensors.mint_max,
    "log": tensors.elementwise("log", np.log),
    "sqrt": tensors.elementwise("sqrt", np.sqrt),
    "square": tensors.elementwise("square", np.square),
}


OWN_NUMBER = 3  # of this process's device
MEMORY = {"free": 100, "reserved": 25, "allocated": 20}


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _properties(device_id: int) -> SimpleNamespace:
    """MindSpore says 0 before the device has computed something. Other processes have used the other devices up."""
    is_ready = sum(RECORD.kernels.values()) > 0
    return SimpleNamespace(free_memory=MEMORY["free"] if is_ready and device_id == OWN_NUMBER else 0)


def modules() -> dict[str, ModuleType]:
    """The modules of MindSpore that Tandem imports."""

    def module(name: str, **contents: Any) -> ModuleType:
        new = ModuleType(name)
        vars(new).update(contents)
        return new

    distributed = module("mindspore.mint.distributed.distributed", get_cache_group_rank=_nothing)
    of_ranks = {function.__name__: function for function in FUNCTIONS}
    collectives = module("mindspore.mint.distributed", distributed=distributed, **of_ranks)
    functional = SimpleNamespace(log_softmax=log_softmax)
    mint = module(
        "mindspore.mint",
        **MINT,
        nn=SimpleNamespace(functional=functional),
        linalg=SimpleNamespace(vector_norm=vector_norm),
        distributed=collectives,
    )
    primitives = {name: lambda *_, **__: _nothing for name in ("Adam", "BatchMatMul")}
    ops = module(
        "mindspore.ops",
        auto_generate=SimpleNamespace(**OPERATORS),
        function=SimpleNamespace(math_func=SimpleNamespace(gmm=gmm)),
        swiglu=swiglu,
        AllReduce=AllReduce,
        MatMul=MatMul,
        Primitive=object,
        **primitives,
    )
    communication = module(
        "mindspore.communication", GlobalComm=SimpleNamespace(WORLD_COMM_GROUP=WORLD), create_group=JOB.create_group
    )
    whole = module(
        "mindspore",
        Tensor=Tensor,
        Type=DType,
        mint=mint,
        ops=ops,
        communication=communication,
        set_context=_nothing,
        set_device=_nothing,
        get_context={"device_target": "Ascend", "device_id": OWN_NUMBER}.__getitem__,
        PYNATIVE_MODE=1,
        device_context=SimpleNamespace(ascend=SimpleNamespace(is_available=lambda: True)),
        hal=SimpleNamespace(get_device_name=lambda _: "Ascend910B2", get_device_properties=_properties),
        runtime=SimpleNamespace(
            synchronize=_nothing,
            memory_reserved=lambda: MEMORY["reserved"],
            memory_allocated=lambda: MEMORY["allocated"],
            max_memory_allocated=lambda: MEMORY["allocated"],
        ),
        **DTYPES,
    )
    found = (whole, mint, ops, collectives, distributed, communication)
    return {one.__name__: one for one in found}
