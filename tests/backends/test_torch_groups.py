"""Groups of ranks: what is sent between devices makes no sockets of the host's; how rows travel between experts."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.backends import hccl
from tandem.backends.experts import Dispatch
from tandem.backends.torch import communication
from tandem.backends.torch.communication import connect, make_groups
from tandem.backends.torch.experts import dispatch_of
from tandem.launch.world import World
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout


@pytest.mark.parametrize(
    ("device", "backend", "of_all"), [("cuda", "nccl", "cpu:gloo,cuda:nccl"), ("cpu", "gloo", "gloo")]
)
def test_only_the_group_of_all_ranks_joins_hosts(
    device: str, backend: str, of_all: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every group waits as long as was asked for."""
    made: list[tuple[Any, ...]] = []
    world = torch.distributed.ProcessGroup(3, 8)

    def new_group(members: list[int], timeout: timedelta, backend: str, *, use_local_synchronization: bool) -> Any:
        assert use_local_synchronization
        made.append((members, backend, timeout))
        return torch.distributed.ProcessGroup(members.index(3), len(members))

    fake = SimpleNamespace(
        rendezvous=lambda *_, **__: iter([("a store", 3, 8)]),
        init_process_group=lambda name, timeout, **_: made.append((name, timeout)),
        new_group=new_group,
        group=SimpleNamespace(WORLD=world),
        DistError=torch.distributed.DistError,
    )
    monkeypatch.setattr(communication, "dist", fake)
    monkeypatch.setattr(communication, "_JOB", communication._Job())
    monkeypatch.setattr(communication, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    connect(World(3, 8, 3), device, 7)
    layout = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    groups = make_groups.__wrapped__(Grid(layout, 8), 3, interleaved=True)
    assert made[0] == (of_all, timedelta(minutes=7))
    assert {entry[1:] for entry in made[1:]} == {(backend, timedelta(minutes=7))}
    members = [entry[0] for entry in made[1:]]
    assert [2, 3] in members  # tensor ranks
    assert [1, 3] in members  # data ranks
    assert members.count([3, 7]) == 4  # stages: activations and gradients, in a row and around
    assert groups.everyone.group is world


@pytest.mark.parametrize(
    ("minutes", "connect", "execute"), [(10, "600", "1800"), (0.5, "120", "1800"), (600, "7200", "36000")]
)
def test_ascends_ranks_wait_as_long_as_was_asked_for(
    minutes: float, connect: str, execute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    hccl.wait_for(minutes)
    assert os.environ == {"HCCL_CONNECT_TIMEOUT": connect, "HCCL_EXEC_TIMEOUT": execute}
    os.environ["HCCL_EXEC_TIMEOUT"] = "60"
    hccl.wait_for(1)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "60"  # what the user says holds


@pytest.mark.parametrize("rank", range(3))
def test_rows_travel_as_numpy_says(rank: int) -> None:
    """With experts without rows, and ranks that send nothing to each other."""
    rows = np.random.default_rng(1).integers(0, 4, (3, 12))
    rows[0], rows[2, 4:8] = 0, 0
    expected, actual = Dispatch.of(rows, rank), dispatch_of(torch.from_numpy(rows), rank)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(actual, name), value, err_msg=name)


def test_no_rows_travel() -> None:
    dispatch = dispatch_of(torch.zeros(2, 4, dtype=torch.int64), 1)
    assert (dispatch.receive, len(dispatch.order), dispatch.counts.tolist()) == ([0, 0], 0, [0, 0])
