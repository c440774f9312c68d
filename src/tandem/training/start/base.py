"""The weights that adapters belong to: the same on all ranks, and recorded in every checkpoint of the adapters."""

from __future__ import annotations

from pathlib import Path

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.interface import TensorSource
from tandem.config.settings import CheckpointSettings, LoraSettings
from tandem.errors import UserError
from tandem.launch.world import Communicator
from tandem.training.logs.log import log_notice


def check_base(source: TensorSource, communicator: Communicator) -> None:
    """Compare the weights of adapters with what a checkpoint recorded. The first rank hashes them for all.

    Raises:
        UserError: on every rank, when they are others.
    """
    if source.base is None:
        return
    problem: UserError | None = None
    if communicator.world.rank == 0:
        try:
            source.check_base()
        except UserError as error:
            problem = error
    text = communicator.all_gather(str(problem) if problem else None)[0]
    if text is not None:
        raise problem or UserError(text)
    source.trust_base()


def saves_weights(source: TensorSource, lora: LoraSettings) -> bool:
    """Whether checkpoints hold the weights, and not adapters alone, which need weights that are in a folder."""
    return not (lora.lora_ckpt_filter and source.base is not None and source.base.folder is not None)


def base_record(source: TensorSource, lora: LoraSettings, communicator: Communicator) -> BaseRecord | None:
    """The weights that checkpoints of adapters refer to; None when checkpoints hold the weights, too."""
    if saves_weights(source, lora):
        if source.config.lora is not None and lora.lora_ckpt_filter:
            why = f", as {source.location} does"
            if source.base is not None:
                why = f": {source.base.location} are in no folder"
            log_notice(f"checkpoints hold the weights, too{why}")
        return None
    assert isinstance(source, Adapted), "only such a source has a base in a folder"
    record = None
    if communicator.world.rank == 0:
        record = source.record or BaseRecord.of(source.base)
    fields = communicator.all_gather(vars(record) if record else None)[0]
    return BaseRecord(**fields)


def check_save_is_not_base(source: TensorSource, checkpoint: CheckpointSettings) -> None:
    """Raise UserError when adapters would be saved among the iterations of the weights that they need."""
    if checkpoint.save is None or source.base is None or source.base.folder is None:
        return
    folder = source.base.folder if source.base.iteration is None else source.base.folder.parent
    if folder.resolve() == Path(checkpoint.save).resolve():
        raise UserError(
            f"--save {checkpoint.save} holds the weights that the adapters need: choose another folder for the adapters"
        )
