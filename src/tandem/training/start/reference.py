"""The reference that preferences are compared with: which weights it is, in a training and in an evaluation.

Its log-probabilities are computed once, before the first step: see `reference_tables`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tandem.backends.interface import Engine
from tandem.checkpoints.adapters.base import digest_of, weight_files
from tandem.checkpoints.adapters.fresh import FreshAdapters
from tandem.checkpoints.adapters.views import Adapted, Merged
from tandem.checkpoints.interface import TensorSource
from tandem.config.parsing import from_dict
from tandem.config.settings import PreferenceSettings, Settings
from tandem.data.datasets.dataset import Dataset
from tandem.errors import UserError
from tandem.files.sha256 import sha256
from tandem.launch.world import Communicator
from tandem.training.evaluation import samples_to_evaluate
from tandem.training.progress import Progress
from tandem.training.start.datasets import kind_to_train
from tandem.training.start.lora import has_fresh_adapters
from tandem.training.start.prepare import PreparedRun
from tandem.training.start.reference_tables import Reference, ReferenceTables
from tandem.training.start.state import TrainerState, saved_settings
from tandem.training.start.weights import open_reference, open_weights


def with_reference(run: PreparedRun, engine: Engine, communicator: Communicator, progress: Progress) -> PreparedRun:
    """Fill the reference of every sample that the run will need. Collective. The engine holds the weights of `run`.

    Returns:
        The run. Its checkpoints name the reference.

    Raises:
        UserError: on every rank. The reference of a resumed run is another, or cannot be computed any more.
    """
    settings = run.settings
    find = Finder(settings, run.source, engine, communicator)
    model = open_reference(settings.preferences, run.source.config)
    recorded: dict[str, Any] | None = run.state.data.get("reference") if run.state else None
    identity = _agreed_identity(find, model, recorded)
    if model is not None:
        reference = find.other(model, identity["sha256"])
    elif run.state is not None and recorded is not None:
        reference = find.recorded(run.state, recorded)
    else:
        reference = Reference(identity["sha256"], nullcontext)  # the run begins with these weights
    tables = ReferenceTables(
        engine,
        communicator,
        run.grid,
        settings.training.micro_batch_size,
        kind_to_train(settings.data),
        settings.data.seq_length,
        run.data.references,
    )
    tables.fill(reference, _needed(run, progress))
    data = replace(run.data, identity={**run.data.identity, "reference": identity})
    return replace(run, data=data)


def _agreed_identity(find: Finder, model: TensorSource | None, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """What checkpoints say of the reference: the hash of its weights, and whether these are the ones under adapters."""
    if model is None and recorded is not None:
        return recorded
    digest = find.agreed_digest(model or find.source)
    if recorded is not None:
        _require_same(digest, recorded, find.settings.preferences, find.source)
    return {"sha256": digest, "under_adapters": model is None and has_fresh_adapters(find.source)}


def check_same_reference(settings: Settings, source: TensorSource, state: TrainerState | None) -> None:
    """Raise UserError when `--ref-model` names other weights than the run that goes on is compared with."""
    model = open_reference(settings.preferences, source.config)
    recorded = state.data.get("reference") if state else None
    if model is not None and recorded is not None:
        _require_same(weights_digest(model, settings.training.seed), recorded, settings.preferences, source)


def _require_same(digest: str, recorded: dict[str, Any], preferences: PreferenceSettings, source: TensorSource) -> None:
    if digest != recorded["sha256"]:
        raise UserError(
            f"--ref-model {preferences.ref_model}: the run in {source.location} is compared with other weights (their "
            f"sha256 differs): give those, or leave it out"
        )


def _needed(run: PreparedRun, progress: Progress) -> list[tuple[Dataset, range]]:
    """The samples that the rest of the run, and its evaluations, need."""
    training = run.settings.training
    last = training.length.samples_from(progress.iteration, progress.consumed_train_samples)
    sets: list[tuple[Dataset, range]] = [
        (run.data.train, range(progress.consumed_train_samples, min(last, len(run.data.train))))
    ]
    for dataset in run.data.valid.values():
        sets.append((dataset, range(samples_to_evaluate(dataset, training.final_batch_size, training.eval_batches))))
    return sets


def reference_to_evaluate(
    settings: Settings, source: TensorSource, engine: Engine, communicator: Communicator
) -> Reference:
    """What the weights in an engine are compared with, when nothing is trained. Collective.

    That is `--ref-model`; or else that of the run that saved the weights; or else the weights under the adapters.

    Raises:
        UserError: on every rank: there is none, or it cannot be read any more.
    """
    find = Finder(settings, source, engine, communicator)
    model = open_reference(settings.preferences, source.config)
    if model is not None:
        return find.other(model, find.agreed_digest(model))
    state = TrainerState.from_source(source)
    if state is not None and (recorded := state.data.get("reference")) is not None:
        saved = saved_settings(source)
        its_own = settings if saved is None else from_dict(saved, f"{source.location}/settings.yaml")
        return replace(find, settings=its_own).recorded(state, recorded)
    if source.base is not None:
        return Reference(find.agreed_digest(source.base), engine.without_adapters)
    raise UserError(
        f"{source.location}: nothing says what it is compared with: give the weights that it was trained from with "
        f"--ref-model FOLDER, or choose --stage orpo or simpo, which compare with nothing"
    )


@dataclass(frozen=True)
class Finder:
    """Finds the weights of a reference.

    Attributes:
        settings: of the run that is compared with it.
        source: what the engine holds, and holds again afterwards.
    """

    settings: Settings
    source: TensorSource
    engine: Engine
    communicator: Communicator

    @property
    def seed(self) -> int:
        return self.settings.training.seed

    def agreed_digest(self, source: TensorSource) -> str:
        """`weights_digest`, computed by the first process. Collective."""
        digest = weights_digest(source, self.seed) if self.communicator.world.rank == 0 else None
        agreed: str = self.communicator.all_gather(digest)[0]
        return agreed

    def other(self, model: TensorSource, digest: str) -> Reference:
        """The weights of `--ref-model`."""
        return Reference(digest, partial(self._loaded, lambda: model if model.config.lora is None else Merged(model)))

    def recorded(self, state: TrainerState, recorded: dict[str, Any]) -> Reference:
        """What a run was compared with from its beginning."""
        held: Callable[[], AbstractContextManager[None]] = partial(
            self._loaded, partial(self._first_weights, state, recorded)
        )
        return Reference(recorded["sha256"], self.engine.without_adapters if recorded["under_adapters"] else held)

    @contextmanager
    def _loaded(self, open_model: Callable[[], TensorSource]) -> Iterator[None]:
        """Inside this context, the engine holds other weights."""
        model, config = open_model(), self.source.config
        off: AbstractContextManager[None] = nullcontext()
        if config.lora is not None and model.config.lora is None:
            model, off = Adapted(FreshAdapters(model, config, self.seed), model, model), self.engine.without_adapters()
        self.engine.load_weights(model)
        try:
            with off:
                yield
        finally:
            self.engine.load_weights(self.source)

    def _first_weights(self, state: TrainerState, recorded: dict[str, Any]) -> TensorSource:
        """What a run began with.

        Raises:
            UserError: on every rank, when it is gone or has changed.
        """
        origin, settings = state.origin, self.settings
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
                checkpoint, settings.lora, settings.model, settings.data.tokenizer_name_or_path, self.seed
            )
            digest = recorded["sha256"]
            if self.communicator.world.rank == 0 and weights_digest(source, self.seed) != digest:
                problem = f"{source.location} has changed"
        except UserError as error:
            problem = str(error)
        problems = [text for text in self.communicator.all_gather(problem) if text]
        if problems or source is None:
            raise UserError(
                f"the log-probabilities of the reference are gone, and so are its weights: {problems[0]}. Give a copy "
                f"of the weights that the run began with: --ref-model FOLDER"
            )
        return source


def weights_digest(source: TensorSource, seed: int) -> str:
    """A sha256 that tells weights apart. New adapters do not count: they change nothing."""
    if source.base is not None and source.adapters is not None:
        base = weights_digest(source.base, seed)
        if has_fresh_adapters(source):
            return base
        return hashlib.sha256((base + weights_digest(source.adapters, seed)).encode()).hexdigest()
    if source.folder is None:  # random ones
        return hashlib.sha256(f"{seed} {source.config.to_dict()}".encode()).hexdigest()
    if not weight_files(source.folder, source.format):  # a folder of PEFT
        digests = [sha256(str(path)) for path in sorted(source.folder.glob("adapter_model.*"))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digest_of(source)
