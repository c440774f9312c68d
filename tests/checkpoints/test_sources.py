"""Sources answer for themselves, and a view answers as its source does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tandem.checkpoints.copy import copy
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.folders import iteration_of
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import (
    HUGGING_FACE,
    MEGATRON,
    NATIVE,
    RANDOM,
    Companions,
    Format,
    TensorSource,
)
from tandem.checkpoints.megatron.sink import MegatronSink
from tandem.checkpoints.native.sink import NativeSink
from tandem.checkpoints.prompt import PROMPT_FILE, prompt_entry
from tandem.checkpoints.random_init import RandomSource
from tandem.checkpoints.views import Cast, FirstLayers
from tandem.models.tensors import EMBEDDING
from tandem.parallel.layout import Layout
from toys import toy_config

CONFIG = toy_config(num_layers=4, vocab_size=212)
LAYOUT = Layout(tensor_model_parallel_size=2)
PROMPT = {"prompt_type": "qwen3"}
DOCUMENTS = {"trainer_state.json": "{}", PROMPT_FILE: json.dumps(PROMPT)}
COMPANIONS = Companions()
VIEWS: dict[str, Callable[[TensorSource], TensorSource]] = {
    "cast": lambda source: Cast(source, "bfloat16"),
    "first layers": lambda source: FirstLayers(source, 2),
    "both": lambda source: Cast(FirstLayers(source, 2), "bfloat16"),
}


def weights() -> RandomSource:
    return RandomSource(CONFIG, 3)


def native(folder: Path, *iterations: int) -> TensorSource:
    for number in iterations:
        sink = NativeSink(folder, CONFIG, LAYOUT, {"model": "float32"}, number, COMPANIONS, DOCUMENTS)
        copy(weights(), sink)
    return open_source(folder)


def megatron(folder: Path) -> TensorSource:
    copy(weights(), MegatronSink(folder, CONFIG, LAYOUT, "float32", 7, COMPANIONS))
    return open_source(folder)


def hugging_face(folder: Path) -> TensorSource:
    copy(weights(), HFSink(folder, CONFIG, "float32", COMPANIONS))
    return open_source(folder)


SOURCES: list[tuple[Format, Callable[[Path], TensorSource]]] = [
    (NATIVE, lambda folder: native(folder, 7)),
    (MEGATRON, megatron),
    (HUGGING_FACE, hugging_face),
    (RANDOM, lambda _: weights()),
]
every_source = pytest.mark.parametrize(("expected", "make"), SOURCES, ids=[expected.name for expected, _ in SOURCES])


@every_source
def test_a_source_answers_for_itself(expected: Format, make: Callable[[Path], TensorSource], tmp_path: Path) -> None:
    source, place = make(tmp_path / "x"), tmp_path / "x"
    assert source.format is expected
    if expected.has_iterations:
        assert (source.iteration, source.folder, source.layout) == (7, place / "iter_0000007", LAYOUT)
    else:
        assert (source.iteration, source.layout) == (None, None)
        assert source.folder == (place if expected is HUGGING_FACE else None)
    assert source.hf_folder == (place if expected is HUGGING_FACE else None)
    assert source.document("trainer_state.json") == ("{}" if expected is NATIVE else None)
    assert source.document("absent.json") is None
    assert prompt_entry(source) == (PROMPT if expected is NATIVE else None)
    assert source.trainer_state() == (tuple(sorted(DOCUMENTS)) if expected is NATIVE else ())
    assert source.unread_optimizer() == ()
    assert source.earlier() is None


@every_source
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_answers_as_its_source_does(
    expected: Format,
    make: Callable[[Path], TensorSource],
    view: Callable[[TensorSource], TensorSource],
    tmp_path: Path,
) -> None:
    source = make(tmp_path / "x")
    seen = view(source)
    for name in ("format", "folder", "iteration", "layout", "location", "companions"):
        assert getattr(seen, name) == getattr(source, name), name
    assert seen.document("trainer_state.json") == source.document("trainer_state.json")
    assert prompt_entry(seen) == prompt_entry(source)
    assert (seen.trainer_state(), seen.unread_optimizer()) == (source.trainer_state(), source.unread_optimizer())
    # transformers casts as it reads; otherwise the tensors are no longer those of the folder
    only_cast = isinstance(seen, Cast) and seen.config == source.config
    assert seen.hf_folder == (source.hf_folder if only_cast else None)
    assert seen.notices == source.notices


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_iteration_before_a_view_is_seen_in_the_same_way(
    view: Callable[[TensorSource], TensorSource], tmp_path: Path
) -> None:
    seen = view(native(tmp_path, 2, 5, 9))
    (tmp_path / "iter_0000005" / "index.json").unlink()
    earlier = seen.earlier()
    assert earlier is not None
    assert (seen.iteration, earlier.iteration) == (9, 2)  # the damaged one is passed over
    assert (earlier.config, earlier.kinds()) == (seen.config, seen.kinds())
    assert np.array_equal(earlier.read(EMBEDDING), seen.read(EMBEDDING))
    assert earlier.dtype(EMBEDDING) == seen.dtype(EMBEDDING)
    assert earlier.earlier() is None


def test_megatrons_optimizer_is_named_where_it_is_not_read(tmp_path: Path) -> None:
    source = megatron(tmp_path)
    assert source.folder is not None
    (source.folder / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"")
    assert open_source(tmp_path).unread_optimizer() == ("distrib_optim.pt",)


@pytest.mark.parametrize(
    ("name", "number"), [("iter_0000012", 12), ("release", None), ("iter_x", None), ("run", None), ("a_3", None)]
)
def test_the_number_of_an_iterations_folder(name: str, number: int | None) -> None:
    assert iteration_of(Path("run") / name) == number
