"""The reference that preferences are compared with: its log-probabilities are computed once, before training.

They are kept in a file beside the data, which later runs share. Its name holds a hash of all that they depend on:
weights, data, template, length and dtype. A file may lack samples that no run has needed yet; they are NaN in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tandem.backends.interface import Engine
from tandem.checkpoints.adapters.base import digest_of, weight_files
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted, Merged
from tandem.checkpoints.interface import TensorSource
from tandem.data.batch import Sample, collate
from tandem.data.datasets.preferences import AnswersDataset
from tandem.data.record import record_of
from tandem.errors import UserError
from tandem.files.sha256 import sha256
from tandem.launch.world import Communicator
from tandem.logs import log
from tandem.parallel.grid import Grid
from tandem.training.evaluation import Share, samples_to_evaluate
from tandem.training.logs.log import log_notice
from tandem.training.progress import Progress
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.prepare import PreparedRun
from tandem.training.start.weights import open_reference, open_weights

MICRO_BATCHES = 16  # of each data rank, between two times that ranks share what they have computed
SECONDS_BETWEEN_SAVES = 300


def with_reference(run: PreparedRun, engine: Engine, communicator: Communicator, progress: Progress) -> PreparedRun:
    """Fill the reference of every sample that the run will need. Collective. The engine holds the weights of `run`.

    Returns:
        The run. Its checkpoints name the reference.

    Raises:
        UserError: on every rank. The reference of a resumed run is another, or cannot be computed any more.
    """
    model = open_reference(run.settings.preferences, run.source.config)
    recorded: dict[str, Any] | None = run.state.data.get("reference") if run.state else None
    identity = _agreed_identity(model, recorded, run, communicator)
    files = _open_files(identity, run, engine.param_dtype, communicator)
    needed = _samples_to_compute(run, progress)
    if (first := next(needed, None)) is not None:
        with _holding(model, recorded, run, engine, communicator):
            _compute(chain([first], needed), run, engine, communicator, files)
    data = replace(run.data, identity={**run.data.identity, "reference": identity})
    return replace(run, data=data)


# --- which weights


def _agreed_identity(
    model: TensorSource | None, recorded: dict[str, Any] | None, run: PreparedRun, communicator: Communicator
) -> dict[str, Any]:
    """What checkpoints say of the reference: the hash of its weights, and whether these are the ones under adapters."""
    if model is None and recorded is not None:
        return recorded
    digest = None
    if communicator.world.rank == 0:
        digest = weights_digest(model or run.source, run.settings.training.seed)
    digest = communicator.all_gather(digest)[0]
    if recorded is not None and digest != recorded["sha256"]:
        raise UserError(
            f"--ref-model {run.settings.preferences.ref_model}: the run in {run.source.location} is compared with "
            f"other weights (their sha256 differs): give those, or leave it out"
        )
    return {"sha256": digest, "under_adapters": model is None and _begins_with_nothing(run.source)}


def _begins_with_nothing(source: TensorSource) -> bool:
    """Whether the adapters are new, so that they change nothing yet."""
    return isinstance(source, Adapted) and isinstance(source.adapters, FreshAdapters)


def weights_digest(source: TensorSource, seed: int) -> str:
    """A sha256 that tells weights apart. New adapters do not count: they change nothing."""
    if isinstance(source, Adapted):
        base = weights_digest(source.base, seed)
        if _begins_with_nothing(source):
            return base
        return hashlib.sha256((base + weights_digest(source.adapters, seed)).encode()).hexdigest()
    if source.folder is None:  # random ones
        return hashlib.sha256(f"{seed} {source.config.to_dict()}".encode()).hexdigest()
    if not weight_files(source.folder, source.format):  # a folder of PEFT
        digests = [sha256(str(path)) for path in sorted(source.folder.glob("adapter_model.*"))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digest_of(source)


@contextmanager
def _holding(
    model: TensorSource | None,
    recorded: dict[str, Any] | None,
    run: PreparedRun,
    engine: Engine,
    communicator: Communicator,
) -> Iterator[None]:
    """Inside this context, the engine computes with the weights of the reference."""
    if model is None and recorded is None:
        yield  # the run begins with them
        return
    if model is None and recorded is not None:
        if recorded["under_adapters"]:
            with engine.without_adapters():
                yield
            return
        model = _first_weights(run, recorded, communicator)
    assert model is not None
    config, seed = run.source.config, run.settings.training.seed
    if run.settings.preferences.ref_model is not None and model.config.lora is not None:
        model = Merged(model)
    off: AbstractContextManager[None] = nullcontext()
    if config.lora is not None and model.config.lora is None:
        model, off = Adapted(FreshAdapters(model, config, seed), model, model), engine.without_adapters()
    engine.load_weights(model)
    try:
        with off:
            yield
    finally:
        engine.load_weights(run.source)


def _first_weights(run: PreparedRun, recorded: dict[str, Any], communicator: Communicator) -> TensorSource:
    """What a resumed run began with.

    Raises:
        UserError: on every rank, when it is gone or has changed.
    """
    assert run.state is not None
    origin, settings = run.state.origin, run.settings
    checkpoint = replace(
        settings.checkpoint,
        load=origin.get("place") or origin.get("load"),
        init=origin.get("init"),
        ckpt_step=origin.get("ckpt_step"),
        finetune=True,
        save=None,
    )
    problem, source = None, None
    try:
        source = open_weights(
            checkpoint, settings.lora, settings.model, settings.data.tokenizer_name_or_path, settings.training.seed
        )
        digest = recorded["sha256"]
        if communicator.world.rank == 0 and weights_digest(source, settings.training.seed) != digest:
            problem = f"{source.location} has changed"
    except UserError as error:
        problem = str(error)
    problems = [text for text in communicator.all_gather(problem) if text]
    if problems or source is None:
        raise UserError(
            f"the log-probabilities of the reference are gone, and so are its weights: {problems[0]}. Give a copy of "
            f"the weights that the run began with: --ref-model FOLDER"
        )
    return source


# --- which samples


def _samples_to_compute(run: PreparedRun, progress: Progress) -> Iterator[Sample]:
    """The samples without a reference that the rest of the run, and its evaluations, need. Some may come twice."""
    training = run.settings.training
    last = training.length.samples_from(progress.iteration, progress.consumed_train_samples)
    sets = [(run.data.train, range(progress.consumed_train_samples, min(last, len(run.data.train))))]
    for dataset in run.data.valid.values():
        count = samples_to_evaluate(dataset, training.final_batch_size, training.eval_batches)
        sets.append((dataset, range(count)))
    for dataset, numbers in sets:
        for answers, number in map(dataset.place, numbers):
            assert isinstance(answers, AnswersDataset)
            if not answers.is_referred(number):
                yield answers[number]


def _compute(
    samples: Iterator[Sample], run: PreparedRun, engine: Engine, communicator: Communicator, files: dict[str, Path]
) -> None:
    """Compute the reference of samples, in place. Each data rank computes its share, and all ranks get all."""
    training, grid = run.settings.training, run.grid
    share = Share(training.micro_batch_size, grid.data_size, grid.place(run.world.rank).data)
    started = saved = time.monotonic()
    done = 0
    while block := list(islice(samples, share.micro_batch_size * share.data_size * MICRO_BATCHES)):
        sums = _sums(block, share, engine, communicator, grid)
        for sample, values in zip(_in_order(block, share), sums, strict=True):
            assert sample.answers is not None
            sample.answers.reference[...] = values
            if not np.isfinite(values).all():
                raise UserError(f"the reference gives an answer a log-probability of {values}: its weights are damaged")
        done += len(block)
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            saved = time.monotonic()
            log_notice(f"reference: log-probabilities of {done:,} samples so far")
            _save(files, run)
    _save(files, run)
    seconds = time.monotonic() - started
    where = ", ".join(map(str, files.values())) or "memory only"
    log_notice(f"reference: log-probabilities of {done:,} samples computed in {seconds:.1f} s, kept in {where}")


def _in_order(block: Sequence[Sample], share: Share) -> Iterator[Sample]:
    """The samples as `_sums` gives their values: by data rank."""
    for rank in range(share.data_size):
        for numbers in replace(share, data_rank=rank).samples(0, len(block)):
            yield from (block[number] for number in numbers)


def _sums(
    block: Sequence[Sample], share: Share, engine: Engine, communicator: Communicator, grid: Grid
) -> Iterator[np.ndarray]:
    """The sums of log p(label) of each sample's documents, float64 [documents], of all data ranks."""
    mine = [collate([block[number] for number in numbers]) for numbers in share.samples(0, len(block))]
    sums = [
        np.add.reduceat(values, batch.cu_seqlens[:-1]) for batch, values in zip(mine, engine.log_probabilities(mine))
    ]
    everyone = communicator.all_gather(np.concatenate([np.empty(0), *sums]).tolist())
    flat = [value for rank in grid.group("data", grid.place(0)) for value in everyone[rank]]
    return iter(np.array(flat).reshape(len(block), -1))


# --- files


def _open_files(identity: dict[str, Any], run: PreparedRun, dtype: str, communicator: Communicator) -> dict[str, Path]:
    """The files of all prefixes. What is in them is put into the tables, if all ranks find the same."""
    names = None
    if communicator.world.rank == 0:
        names = {prefix: _name(prefix, identity, run, dtype) for prefix in run.data.references}
    names = communicator.all_gather(names)[0]
    files = {}
    for prefix, name in names.items():
        path = Path(f"{prefix}_reference_{name}.npy")
        table = run.data.references[prefix]
        found = read_table(path, table.shape)
        digest = None if found is None else hashlib.sha256(found.tobytes()).hexdigest()
        if len(set(communicator.all_gather(digest))) == 1 and found is not None:
            table[...] = found
            known = int(np.count_nonzero(~np.isnan(found).any(axis=1)))
            log_notice(f"reference: log-probabilities of {known:,} samples from {path}")
        if os.access(path.parent, os.W_OK):
            files[prefix] = path
        else:
            log_notice(f"reference: {path.parent} cannot be written to, so the log-probabilities are not kept")
    return files


def _name(prefix: str, identity: dict[str, Any], run: PreparedRun, dtype: str) -> str:
    """A hash of all that the log-probabilities of a prefix depend on."""
    kind, record = kind_to_train(run.settings.data), record_of(prefix)
    files = [f"{kind.pair(prefix, key)}{suffix}" for key in kind.keys for suffix in (".bin", ".idx")]
    facts = {
        "weights": identity["sha256"],
        "data": [sha256(file) for file in files],
        "template": record["template"] if record else None,
        "seq_length": run.settings.data.seq_length,
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_table(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The table in a file; None when there is none, or a damaged one, which is said."""
    if not path.exists():
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s: damaged: %s; computed again", path, error)
        return None
    if table.shape != shape or table.dtype != np.float64:
        log.warning("%s: damaged: %s %s; computed again", path, table.dtype, list(table.shape))
        return None
    return np.asarray(table)


def _save(files: dict[str, Path], run: PreparedRun) -> None:
    """Write the tables, on the first process of each machine. What another run has added meanwhile is kept."""
    if run.world.local_rank:
        return
    for prefix, path in files.items():
        table = run.data.references[prefix]
        found = read_table(path, table.shape)
        whole = table if found is None else np.where(np.isnan(table), found, table)
        work = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
        with open(work, "wb") as file:
            np.save(file, whole)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
