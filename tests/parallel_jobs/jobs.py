"""Layouts to train toys in, and what a job of several processes must agree with: the same steps in one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_work import MemorySource, any_weights, mean_weights, toy_samples, toy_weights, untrained

from launchers import launcher
from spoiled import Where, spoiled
from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.data.batch import AskedBatch, MicroBatch, collate
from tandem.models.config import ModelConfig
from tandem.models.experts import Experts
from tandem.models.lora import Lora
from tandem.models.tensors import tensor_table
from tandem.parallel.grid import Grid
from tandem.parallel.layout import Layout
from tandem.parallel.slices import Part, transfer
from tandem.training.expert_load import ExpertWatch, from_json, to_json
from tandem.training.logs.events import EventLog
from toys import toy_config

JOB = Path(__file__).with_name("layout_job.py")
TOLERANCE = 1e-4
LOSS_SCALE, OVERFLOWING = 2.0**10, 2.0**40  # with fp16
FP16_ROUNDING = 2.0**-11
FP16_OTHER_TOKENS = 0.02  # 2 of 154 were seen, where the CPU itself multiplies fp16
SPOILED_RANK, SPOILED_STEP = 1, 3
EXPERTS = Experts(num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=24, norm_topk_prob=True, mlp_only_layers=(2,))

ADAPTERS = {
    "lora": Lora(r=3, lora_alpha=6, rank_pattern=(("q_proj", 5),)),
    "shared A": Lora(r=3, lora_alpha=6, target_modules=("linear_qkv", "linear_fc1", "linear_proj", "linear_fc2")),
    "some": Lora(r=3, target_modules=("v_proj", "o_proj", "up_proj"), layers_to_transform=(1,), use_rslora=True),
    "dora": Lora(r=3, lora_alpha=6, use_dora=True),
    "dropout": Lora(r=3, lora_alpha=6, lora_dropout=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A toy, its data, and how it is spread.

    Attributes:
        idle: one micro-batch of each step has nothing to train.
        spoiled: what is NaN on rank SPOILED_RANK in step SPOILED_STEP.
        fp16: with a loss scale, which is too large in step SPOILED_STEP.
        weighted: each token has a weight of its own; otherwise the loss is the mean.
        adapters: a key of ADAPTERS; only these are trained.
        steps, micro_batches: how many steps, of so many micro-batches over all data ranks.
        balance: the coefficient of the load-balancing loss, and of the z-loss.
        overlap: data ranks communicate while passes compute.
        capacity: how much more than its even share an expert takes; None for all.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vpp: int | None = None
    noop_layers: tuple[int, ...] = ()
    num_layer_list: tuple[int, ...] | None = None
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    use_torch_fsdp2: bool = False
    recompute_layers: int = 0
    family: str = "qwen3"
    tied: bool = True
    packed: bool = False
    idle: bool = False
    num_layers: int = 4
    lr: float = 1e-3
    spoiled: Where | None = None
    fp16: bool = False
    weighted: bool = False
    adapters: str = ""
    steps: int = 10
    micro_batches: int = 8
    ep: int = 1
    etp: int | None = None
    extend: bool = False
    balance: float = 0.0
    overlap: bool = False
    capacity: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    @property
    def name(self) -> str:
        changed = {name: value for name, value in asdict(self).items() if value != getattr(Case(), name)}
        words = [f"{name}{value}" for name, value in changed.items()]
        return "-".join(words).translate(str.maketrans("", "", "(), ")) or "plain"

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_layers_per_virtual_pipeline_stage=self.vpp,
            noop_layers=self.noop_layers,
            num_layer_list=self.num_layer_list,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            moe_tp_extend_ep=self.extend,
        )

    def loss_scale(self, step: int) -> float:
        if not self.fp16:
            return 1.0
        return OVERFLOWING if step == SPOILED_STEP else LOSS_SCALE

    def is_applied(self, step: int) -> bool:
        return step != SPOILED_STEP or not (self.spoiled or self.fp16)

    @property
    def work(self) -> Case:
        """What must not depend on the layout: the same in one process."""
        names = ("family", "tied", "packed", "idle", "num_layers", "lr", "spoiled", "fp16", "weighted", "adapters")
        names += ("steps", "micro_batches", "balance", "capacity")
        return Case(**{name: getattr(self, name) for name in names})


def toy_source(case: Case) -> MemorySource:
    """Eight query heads in four groups; the vocabulary is a prime, so that slices are uneven."""
    return toy_weights(
        toy_config(
            model_type=case.family,
            num_layers=case.num_layers,
            num_attention_heads=8,
            num_query_groups=4,
            untie_embeddings_and_output_weights=not case.tied,
            lora=ADAPTERS.get(case.adapters),
            experts=EXPERTS if case.family == "qwen3_moe" else None,
        )
    )


def engine_settings(case: Case, grid: Grid, rank: int) -> EngineSettings:
    return EngineSettings(
        device="cpu",
        grid=grid,
        rank=rank,
        sequence_parallel=case.sequence_parallel,
        use_distributed_optimizer=case.use_distributed_optimizer,
        use_torch_fsdp2=case.use_torch_fsdp2,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap,
        recompute_layers=case.recompute_layers,
        fp16=case.fp16,
        moe_aux_loss_coeff=case.balance,
        moe_z_loss_coeff=case.balance,
        moe_expert_capacity_factor=case.capacity,
    )


def micro_batches(case: Case, config: ModelConfig) -> list[list[MicroBatch]]:
    """For each step, the micro-batches of all data ranks: windows of one length, or packed answers of many."""
    generator = np.random.default_rng(5)
    steps = []
    for step in range(case.steps):
        batches = []
        for number in range(case.micro_batches):
            lengths = generator.integers(1, 9, 4) if case.packed else (16,)
            trained = 0.4 if case.packed else 1.0
            samples = toy_samples(config, [int(n) for n in lengths], seed=100 * step + number, trained=trained)
            if case.idle and number == 2:
                samples = [untrained(sample) for sample in samples]
            batches.append(collate(samples))
        steps.append(batches)
    return steps


@dataclass(frozen=True)
class Outcome:
    """What training ended with: numbers per step, the load of experts in the last, and every tensor, whole."""

    evaluated: list[float]
    scored: list[float]
    likeliest: list[float]
    first_loss: float
    losses: list[float]
    norms: list[float]
    trained: list[int]
    applied: list[bool]
    load: dict[str, float]
    tensors: dict[str, np.ndarray]


@functools.cache
def one_process(framework: str, case: Case) -> Outcome:
    engine = create_engine(framework, toy_source(case).config, engine_settings(case, Grid(), 0))
    outcome = train(framework, engine, case, rank=SPOILED_RANK)
    outcome["load"] = together([outcome["load"]])
    return Outcome(
        **outcome, tensors={f"{kind} {shard.spec.name}": array.copy() for kind, shard, array in engine.tensors()}
    )


def train(framework: str, engine: Engine, case: Case, rank: int, data: slice = slice(None)) -> dict[str, Any]:
    """All of a case, on the `data` rank's micro-batches: `Outcome` without its tensors."""
    source = toy_source(case)
    engine.load_weights(source)
    steps = micro_batches(case, source.config)
    # Data ranks may bring different numbers of micro-batches.
    evaluated = engine.evaluate(steps[0][:-1][data])
    scored, likeliest = scores(engine, steps[0])
    with engine.without_adapters():
        more = scores(engine, steps[0])
    weigh = any_weights if case.weighted else mean_weights
    first_loss, _ = engine.loss_and_gradients(steps[0][data], weigh(steps[0])[data])
    results = []
    for number, batches in enumerate(steps):
        weights = weigh(batches)[data]
        spoils = case.spoiled and (rank, number) == (SPOILED_RANK, SPOILED_STEP)
        with spoiled(framework, engine, case.spoiled) if spoils else nullcontext():
            results.append(engine.train_step(batches[data], weights, case.lr, 0.1, loss_scale=case.loss_scale(number)))
    return {
        "evaluated": list(evaluated),
        "scored": scored + more[0],
        "likeliest": likeliest + more[1],
        "first_loss": first_loss,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "trained": [result.trained_tokens for result in results],
        "applied": [result.applied for result in results],
        "load": to_json(engine.expert_load()),
    }


def together(loads: list[list[Any]]) -> dict[str, float]:
    """The metrics of experts, from the loads of all ranks."""
    return ExpertWatch(EventLog(None)).metrics(1, map(from_json, loads))


def scores(engine: Engine, batches: list[MicroBatch]) -> tuple[list[float], list[float]]:
    """A number for each micro-batch that shows when a log-probability has changed or moved, and the likeliest tokens.

    The numbers are those of `log_probabilities` and of `label_scores`.
    """
    found = engine.label_scores([AskedBatch.of(batch, *batch.judged) for batch in batches if batch.trained_tokens])
    numbers = [*engine.log_probabilities(batches), *(logps.astype(np.float64) for logps, _ in found)]
    scored = [float(values @ np.sqrt(np.arange(1, 1 + len(values)))) for values in numbers]
    return scored, [float(token) for _, tokens in found for token in tokens]


def run_job(
    framework: str, processes: int, cases: list[Case], folder: Path, timeout: float = 300
) -> dict[str, Outcome]:
    """Train every case in one job of so many processes."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
    command = [
        *launcher(framework, processes, forked=True),
        str(JOB),
        framework,
        str(folder / "cases.json"),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {case.name: gather(case, folder) for case in cases}


def leave(outcome: dict[str, Any], engine: Engine, case: Case, rank: int, folder: Path) -> None:
    """Write a rank's outcome, and its part of every tensor, for `gather`."""
    arrays, parts = {}, []
    for number, (kind, shard, array) in enumerate(engine.tensors()):
        arrays[str(number)] = array.copy()
        parts.append([kind, shard.spec.name, shard.part.boxes, shard.part.dim])
    np.savez(folder / f"{case.name}-{rank}.npz", **arrays)
    (folder / f"{case.name}-{rank}.json").write_text(json.dumps({**outcome, "parts": parts}), encoding="utf-8")


def gather(case: Case, folder: Path) -> Outcome:
    """Put the ranks' parts together; every number of every tensor must come from exactly one rank."""
    table = tensor_table(toy_source(case).config)
    tensors: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    outcomes = []
    for rank in range(case.processes):
        outcome = json.loads((folder / f"{case.name}-{rank}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"{case.name}-{rank}.npz") as arrays:
            for number, (kind, name, boxes, dim) in enumerate(outcome.pop("parts")):
                key, shape = f"{kind} {name}", table[name].shape
                part = Part(tuple(tuple((start, stop) for start, stop in box) for box in boxes), dim)
                whole = tensors.setdefault(key, np.full(shape, np.nan, np.float32))
                transfer(arrays[str(number)], part, whole, Part.whole(shape))
                count = counts.setdefault(key, np.zeros(shape, int))
                transfer(np.ones(part.shape, int), part, count, Part.whole(shape))
        outcomes.append(outcome)
    load = together([outcome.pop("load") for outcome in outcomes])
    if (
        case.ep > 1
    ):  # each rank scores the same texts, but experts see them after those of other ranks: rounding differs
        for outcome in outcomes[1:]:
            np.testing.assert_allclose(outcome["scored"], outcomes[0]["scored"], rtol=1e-6, err_msg=case.name)
            outcome["scored"] = outcomes[0]["scored"]
    assert len({str(outcome) for outcome in outcomes}) == 1, f"{case.name}: ranks report different numbers"
    assert all((count == 1).all() for count in counts.values()), f"{case.name}: not each number once"
    return Outcome(**outcomes[0], load=load, tensors=tensors)


def assert_equal_to_one_process(case: Case, found: Outcome, framework: str) -> None:
    """Losses, gradient norms and every final tensor within TOLERANCE of one process's.

    In fp16 tensor ranks round each their part of a sum: losses are within a rounding, norms within two, and masters and
    moments differ by at most 0.04 of what training made of them (0.02 was seen; the smallest gradients are rounding
    errors, of which Adam makes whole steps). Weights are the masters, rounded. Of two tokens that are equally likely up
    to a rounding, either may be the likeliest.
    """
    expected = one_process(framework, case.work)
    assert found.trained == expected.trained, case.name
    assert found.applied == expected.applied, case.name
    assert found.applied == [case.is_applied(step) for step in range(case.steps)], case.name
    first, later, norm = (
        (FP16_ROUNDING, FP16_ROUNDING, 2 * FP16_ROUNDING) if case.fp16 else (1e-5, TOLERANCE, TOLERANCE)
    )
    np.testing.assert_allclose(found.evaluated, expected.evaluated, rtol=first, err_msg=case.name)
    np.testing.assert_allclose(found.scored, expected.scored, rtol=first, err_msg=case.name)
    others = np.mean(np.not_equal(found.likeliest, expected.likeliest))
    assert others <= (FP16_OTHER_TOKENS if case.fp16 else 0), f"{case.name}: {others:.2%} other tokens are likeliest"
    np.testing.assert_allclose(found.first_loss, expected.first_loss, rtol=first, err_msg=case.name)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=later, err_msg=case.name)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=norm, err_msg=case.name)
    assert found.load == pytest.approx(expected.load, rel=TOLERANCE), case.name
    assert found.tensors.keys() == expected.tensors.keys(), case.name
    if case.fp16:
        assert_close_in_fp16(case, found.tensors, expected.tensors)
        return
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, atol=TOLERANCE, rtol=0, err_msg=f"{case.name}: {name}")


def assert_close_in_fp16(case: Case, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    source = toy_source(case)
    for key, tensor in expected.items():
        kind, name = key.split()
        if kind == "model":
            master = found.get(f"master {name}", source.read(name))  # what is not trained has none
            np.testing.assert_array_equal(found[key], master.astype(np.float16), err_msg=f"{case.name}: {name}")
            continue
        start = source.read(name) if kind == "master" else np.zeros_like(tensor)
        error, change = np.linalg.norm(found[key] - tensor), np.linalg.norm(tensor - start)
        assert error < 0.04 * change, f"{case.name}: {key} is off by {error / change:.3g} of its change"
