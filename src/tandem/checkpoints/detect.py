"""Recognise what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tandem.checkpoints.adapters.base import BaseRecord
from tandem.checkpoints.adapters.peft import PeftSource, is_peft
from tandem.checkpoints.adapters.peft_config import BASE, is_for, read_config
from tandem.checkpoints.adapters.views import Adapted
from tandem.checkpoints.folders import TRACKER, find_iteration, holds_iterations, iteration_of, saved_iterations
from tandem.checkpoints.hf.companions import chat_template_of
from tandem.checkpoints.hf.source import HFSource
from tandem.checkpoints.hf.weights import holds_weights
from tandem.checkpoints.interface import TensorSource, check_recorded
from tandem.checkpoints.megatron.names import FILE
from tandem.checkpoints.megatron.source import MegatronSource
from tandem.checkpoints.native.format import INDEX
from tandem.checkpoints.native.source import NativeSource
from tandem.checkpoints.recognise import is_model_folder, no_adapter, unusable
from tandem.checkpoints.torch_dist.metadata import METADATA
from tandem.checkpoints.torch_dist.source import TorchDistSource, is_torch_dist
from tandem.errors import UserError
from tandem.files.publish import recover
from tandem.models.config import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11

# The forms of an iteration, by the file that marks each.
NATIVE_SIGN = f"{INDEX} (native)"
TORCH_SIGN = f"mp_rank_*/{FILE} (Megatron torch)"
TORCH_DIST_SIGN = f"{METADATA} (Megatron torch_dist)"


class Facts(TypedDict, total=False):
    """What a checkpoint may not record, or no longer rightly.

    config, noop_layers, num_layer_list, lora_alpha: of a Megatron checkpoint. Layers of `torch_dist` are counted over
        the whole model, so num_layer_list is not needed there.
    adapters_alone: a checkpoint of adapters is opened without their weights, to look at it.
    base: where the weights of adapters are now, if they are no longer where their checkpoint says.
    """

    config: ModelConfig | None
    noop_layers: tuple[int, ...] | None
    num_layer_list: tuple[int, ...] | None
    lora_alpha: float | None
    adapters_alone: bool
    base: str | None


def open_source(folder: str | Path, iteration: int | None = None, **facts: Unpack[Facts]) -> TensorSource:
    """Recognise what a folder holds, and open it.

    Raises:
        UserError: the folder is missing, is neither a Hugging Face folder nor a checkpoint, is both, or contradicts
            these facts.
    """
    folder = Path(folder)
    recover(folder)
    if is_peft(folder) and not (folder / "config.json").exists():
        return open_adapters(folder, open_named_base(folder))
    if not (is_model_folder(folder) or (iteration is not None and saved_iterations(folder))):
        raise unusable(folder)
    if iteration is None:
        check_one_format(folder)
    if (folder / "config.json").exists() and not holds_iterations(folder):
        if iteration is not None:
            raise UserError(
                f"{folder} is a Hugging Face folder, which has no iteration {iteration}: leave out --ckpt-step"
            )
        return HFSource(folder)
    return open_iteration(folder, iteration, **facts)


def is_hugging_face(folder: str | Path) -> bool:
    """Whether a folder holds a Hugging Face model: a config and weights."""
    return (Path(folder) / "config.json").exists() and holds_weights(Path(folder))


def check_one_format(folder: str | Path) -> None:
    """Raise UserError when a folder holds a Hugging Face model and also iterations: which one is meant is not known."""
    if is_hugging_face(folder) and holds_iterations(folder):
        raise UserError(
            f"{folder} holds two models: a Hugging Face one (config.json and weights), and a checkpoint ({TRACKER} or "
            f"iter_*). Give --ckpt-step N for the checkpoint's iteration N, or move one of the two elsewhere"
        )


def open_iteration(folder: str | Path, iteration: int | None = None, **facts: Unpack[Facts]) -> TensorSource:
    """Open an iteration of a checkpoint folder, in any format. Arguments and errors are as in `open_source`."""
    config, noop_layers, num_layer_list = facts.get("config"), facts.get("noop_layers"), facts.get("num_layer_list")
    place = find_iteration(folder, iteration)
    if not place.is_dir():
        raise _missing(Path(folder), iteration)
    form = _form_of(place)
    if form == TORCH_SIGN:
        megatron = MegatronSource(
            folder,
            iteration,
            config=config,
            noop_layers=noop_layers,
            num_layer_list=num_layer_list,
            lora_alpha=facts.get("lora_alpha"),
        )
        if megatron.holds_adapters_only and not facts.get("adapters_alone"):
            raise UserError(
                f"{folder} holds adapters only: give their weights, and the adapters with --lora-load {folder}"
            )
        return megatron
    if form == TORCH_DIST_SIGN:
        return TorchDistSource(folder, iteration, config=config, noop_layers=noop_layers)
    source = NativeSource(folder, iteration)
    check_recorded("noop_layers", noop_layers, source.layout.noop_layers, source.location)
    check_recorded("num_layer_list", num_layer_list, source.layout.num_layer_list, source.location)
    if source.record is None or facts.get("adapters_alone"):
        return source
    return with_base(source, source.record, facts.get("base"))


def open_named_base(folder: Path) -> TensorSource:
    """The model that a PEFT folder names, where that is a folder here."""
    name = read_config(folder).get(BASE)
    if not isinstance(name, str) or not Path(name).is_dir():
        raise unusable(folder)
    return open_source(name)


def with_base(adapters: TensorSource, record: BaseRecord, moved_to: str | None = None) -> Adapted:
    """A checkpoint of adapters with the weights that it names.

    Args:
        moved_to: where these are looked for, too.

    Raises:
        UserError: these weights are not there. Whether they are the same is checked when the first one is read.
    """
    problem: UserError | None = None
    for place in dict.fromkeys((record.folder, moved_to or record.folder)):
        try:
            base = open_source(place, record.iteration)
        except UserError as error:
            problem = error
            continue
        return Adapted(adapters, base, adapters, record if place == record.folder else record.moved_to(base))
    iteration = "" if record.iteration is None else f", iteration {record.iteration}"
    raise UserError(
        f"{adapters.location} holds adapters only; the weights that they belong to, which were in {record.folder}"
        f"{iteration}, cannot be opened: {problem}. If these are elsewhere now, give --load FOLDER --lora-load "
        f"{adapters.location}"
    ) from problem


def open_with_adapters(
    folder: str | Path,
    iteration: int | None,
    lora_load: str | None,
    *,
    config: ModelConfig | None = None,
    lora_alpha: float | None = None,
) -> TensorSource:
    """The weights in a folder, with the adapters of `--lora-load` where it is given.

    Args:
        config, lora_alpha: as in `open_source`.
    """
    if lora_load is None:
        return open_source(folder, iteration, config=config, lora_alpha=lora_alpha)
    return open_adapters(lora_load, open_source(folder, iteration, config=config), lora_alpha)


def open_adapters(folder: str | Path, base: TensorSource, lora_alpha: float | None = None) -> Adapted:
    """Adapters from a PEFT folder or from a checkpoint with adapters, next to the weights `base`.

    Args:
        folder: of a checkpoint, or of one of its iterations.
        lora_alpha: of adapters in Megatron's files, when these do not record it.

    Raises:
        UserError: the folder holds no adapters, or those of another model, or of other weights.
    """
    folder = Path(folder)
    if base.config.lora is not None:
        raise UserError(
            f"--lora-load {folder}: {base.location} has adapters already: give the weights without adapters, or merge "
            f"those first with tandem export"
        )
    if is_peft(folder):
        source = PeftSource(folder, base.config.without_adapters, base.folder)
        if base.folder is not None and not is_for(folder, base.folder):
            source.notices = (*source.notices, _other_model(folder, base))
        if chat_template_of(source.companions) not in (None, chat_template_of(base.companions)):
            source.notices = (*source.notices, f"{folder}: its chat template is not used, but that of {base.location}")
        return Adapted(source, base, base)
    if not folder.is_dir():
        raise no_adapter(folder)
    iteration = iteration_of(folder)
    if iteration is not None:
        folder = folder.parent
    elif not holds_iterations(folder):
        raise no_adapter(folder)
    form = _form_of(find_iteration(folder, iteration))
    if form == TORCH_SIGN:
        config = base.config.without_adapters
        megatron = MegatronSource(folder, iteration, config=config, lora_alpha=lora_alpha)
        check_adapters(megatron, folder)
        return Adapted(megatron, base, base)
    if form != NATIVE_SIGN:
        raise UserError(f"--lora-load {folder}: expected a PEFT folder, a run that trained adapters, or {TORCH_SIGN}")
    native = NativeSource(folder, iteration)
    check_adapters(native, folder)
    return Adapted(native, base, native, native.record)


def _other_model(folder: Path, base: TensorSource) -> str:
    """A notice about a PEFT folder that names another model."""
    name = read_config(folder)[BASE]
    return f"{folder}: names {name} as its model, and is put on {base.location}: whether they are the same is not known"


def check_adapters(source: TensorSource, folder: Path) -> None:
    """Raise UserError unless the source of `--lora-load` has adapters."""
    if source.config.lora is None:
        raise UserError(f"--lora-load {folder} holds no adapters: give whole weights with --load")


def _form_of(iteration: Path) -> str:
    """In which of the forms an iteration is stored. Raises UserError when it is none of them, or several."""
    signs = {
        NATIVE_SIGN: (iteration / INDEX).exists(),
        TORCH_SIGN: any(iteration.glob(f"mp_rank_*/{FILE}")),
        TORCH_DIST_SIGN: is_torch_dist(iteration),
    }
    forms = [form for form, found in signs.items() if found]
    if not forms:
        raise UserError(f"{iteration} holds no checkpoint: expected {NATIVE_SIGN}, {TORCH_SIGN}, or {TORCH_DIST_SIGN}")
    if len(forms) > 1:
        raise UserError(
            f"{iteration} holds two checkpoints: {' and '.join(forms)}. Move the files of one of the two away"
        )
    return forms[0]


def _missing(folder: Path, iteration: int | None) -> UserError:
    """The error for an iteration that is not there."""
    iterations = saved_iterations(folder)
    there = f"there are {', '.join(map(str, sorted(iterations)))}" if iterations else "there are no others"
    if iteration is not None:
        return UserError(f"--ckpt-step {iteration}: {folder} has no iteration {iteration}; {there}")
    step = f": --ckpt-step {iterations[0]} takes the newest of these" if iterations else ""
    return UserError(f"{folder / TRACKER} names {find_iteration(folder).name}, which is not there; {there}{step}")
