"""Before the first step, the processes of a run compare what must be equal: settings, versions, data, weights.

Machines are started one by one, each with a command and files of its own. Otherwise a slip would train replicas that
drift apart, or leave all waiting for each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tandem
from tandem.backends.interface import Engine
from tandem.checkpoints.interface import TensorSource
from tandem.checkpoints.native.format import INDEX
from tandem.config.settings import GROUPS, DataSettings, Settings
from tandem.data.datasets.blend import parse_blend
from tandem.data.kinds import kind_of
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.errors import UserError
from tandem.files.sampled import sampled_digest
from tandem.frameworks import ANY_VERSION, FRAMEWORKS
from tandem.launch.world import Communicator
from tandem.models.config import ModelConfig
from tandem.options import PathText, alternatives, flag_of, options_of
from tandem.training.run_record import versions
from tandem.training.start.data_paths import named_sets

# What each machine may have for itself. Only the first process logs, and `workers` changes no result.
OWN_GROUPS = {"launch", "logging"}
OWN = {"workers"}
COMMON = ("nproc_per_node", "nnodes")  # of the group `launch`
# Files that hold weights; those of the first pattern that finds some.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "mp_rank_*/*.pt", "*.distcp")
DIGITS = 12  # of a hash

Facts = Mapping[str, Mapping[str, Any]]  # kind of fact -> name -> value, which JSON can hold

# What to do about each kind of fact that differs.
SETTINGS = "give the same command on every machine"
VERSIONS = f"install the same on every machine, or try it with {ANY_VERSION}=1 on all"
DATA = "copy the same files to every machine"
DEVICES = "take machines with the same devices"


def agree_on_start(
    communicator: Communicator, settings: Settings, framework: str, config: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Compare settings, versions, the model, tokenizer and data with those of all other processes. Collective.

    Raises:
        UserError: on every process, with one problem for each value that differs.
    """
    if communicator.world.size > 1:
        versions = {} if os.environ.get(ANY_VERSION) == "1" else _versions(framework)
        model = {f"the model's {name}": value for name, value in config.to_dict().items()}
        files = {"the tokenizer": tokenizer and tokenizer.sha256[:DIGITS], **dict(_data(settings.data))}
        facts = {SETTINGS: _settings(settings), VERSIONS: versions, DATA: {**model, **files}}
        _compare(communicator, facts)


def agree_on_weights(communicator: Communicator, engine: Engine, source: TensorSource) -> None:
    """Compare the weights that were loaded, and their dtype. Collective.

    Raises:
        UserError: as in `agree_on_start`.
    """
    if communicator.world.size > 1:
        facts = {DATA: {"--load": weights_identity(source)}, DEVICES: {"the dtype to compute in": engine.param_dtype}}
        _compare(communicator, facts)


def _compare(communicator: Communicator, facts: Facts) -> None:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(communicator.all_gather(digest))) > 1:
        raise UserError(*differences(communicator.all_gather(facts)))


def differences(everyone: Sequence[Facts]) -> Iterator[str]:
    """A text for each fact that differs, given the facts of every rank."""
    for kind in everyone[0]:
        for name in dict.fromkeys(name for facts in everyone for name in facts[kind]):
            ranks: dict[str, list[int]] = {}
            for rank, facts in enumerate(everyone):
                ranks.setdefault(_in_words(facts[kind].get(name)), []).append(rank)
            if len(ranks) > 1:
                values = ", ".join(f"{value} on {_ranks_in_words(numbers)}" for value, numbers in ranks.items())
                yield f"{name} differs between the processes: {values}: {kind}"


def _settings(settings: Settings) -> dict[str, Any]:
    """Settings by flag. Of a path only whether it is given: machines may keep their files in places of their own."""
    values = settings.to_dict()
    compared = {flag_of(name): values["launch"][name] for name in COMMON}
    for group in GROUPS.keys() - OWN_GROUPS:
        for name, option in options_of(GROUPS[group]).items():
            if name not in OWN:
                value = values[group][name]
                compared[option.flag] = (value not in (None, [])) if _is_path(option.hint) else value
    return dict(sorted(compared.items()))


def _is_path(hint: Any) -> bool:
    return any(PathText in (kind, *getattr(kind, "__args__", ())) for kind in alternatives(hint))


def _versions(framework: str) -> dict[str, Any]:
    others = {other.name for other in FRAMEWORKS if other.name != framework}
    found = {f"the version of {name}": text for name, text in versions().items() if name not in others}
    return {**found, "the code of tandem": _code()}


@cache
def _code() -> str:
    """A hash of Tandem's source files."""
    folder, digest = Path(tandem.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:DIGITS]


def _data(data: DataSettings) -> Iterator[tuple[str, Any]]:
    """The content of each data set, by its place in the flags, and the weights between them."""
    prefixes, weights = parse_blend(data.data_path) if data.data_path else ([], None)
    yield "--data-path", {"sets": len(prefixes), "weights": weights}
    for number, prefix in enumerate(prefixes, start=1):
        yield f"--data-path, set {number}", _files(prefix)
    for name, prefix in named_sets(data.valid_data_path).items() if data.valid_data_path else ():
        yield f"--valid-data-path, set {name}", _files(prefix)


def _files(prefix: str) -> dict[str, str]:
    """Hashes of the files of a data set; of a file of questions, that of the file."""
    kind = kind_of(prefix)
    if kind is None and os.path.isfile(prefix):
        return {"": sampled_digest(prefix)[:DIGITS]}
    pairs = [kind.pair(prefix, key) for key in kind.keys] if kind and kind.keys else [prefix]
    files = [f"{pair}{suffix}" for pair in pairs for suffix in (".bin", ".idx")]
    return {file.removeprefix(prefix): sampled_digest(file)[:DIGITS] for file in files}


def weights_identity(source: TensorSource) -> Any:
    """What an index says of the weights, or hashes of the files that hold them; None for random weights.

    JSON can hold it. Of weights with adapters, both.
    """
    if source.base is not None and source.adapters is not None:
        return {"weights": weights_identity(source.base), "adapters": weights_identity(source.adapters)}
    if source.folder is None:
        return None  # random weights follow from the settings
    if (index := source.document(INDEX)) is not None:
        return hashlib.sha256(index.encode()).hexdigest()[:DIGITS]
    found = (sorted(source.folder.glob(pattern)) for pattern in WEIGHTS)
    paths: list[Path] = next(filter(None, found), [])
    return {str(path.relative_to(source.folder)): sampled_digest(path)[:DIGITS] for path in paths}


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name or 'file'}: {_in_words(inner)}" for name, inner in value.items()) + "}"
    return "none" if value is None else str(value)


def _ranks_in_words(ranks: Sequence[int]) -> str:
    """
    >>> _ranks_in_words([1]), _ranks_in_words([4, 5, 6])
    ('rank 1', 'ranks 4 to 6')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) == ranks[-1] - ranks[0] + 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
