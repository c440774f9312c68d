"""Computing a certificate while a model is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tandem.backends import create_engine
from tandem.backends.interface import Engine, EngineSettings
from tandem.checkpoints.interface import Companions, TensorKind, TensorSource, dtype_name
from tandem.checkpoints.prompt import prompt_entry
from tandem.checkpoints.views import Cast, Described, View
from tandem.conversion.certificate.content import Certificate, Computed, Probe
from tandem.conversion.certificate.probes import probes_of
from tandem.conversion.verify import document
from tandem.data.batch import AskedBatch, collate
from tandem.data.templates.catalog import template_from_entry
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.machine import available_bytes
from tandem.models.hf_config import DEFAULT_ROPE_THETA
from tandem.models.tensors import EMBEDDING, parameter_count, tensor_table
from tandem.parallel.slices import Part
from tandem.version import __version__

BYTES_PER_PARAMETER = 4  # engines compute in fp32 here
ROOM = 1 << 30  # bytes for frameworks, logits and the tensor that is being read

# Names of known faults
NO_ADAPTERS = "without its adapters"
# the norms that a fault leaves as they are in a new model
NEW_NORMS = {
    "with q_norm of one": ("q_layernorm.weight",),
    "with k_norm of one": ("k_layernorm.weight",),
    "with q_norm and k_norm of one": ("q_layernorm.weight", "k_layernorm.weight"),
}
NO_NORMS = "without q_norm and k_norm"
DEFAULT_THETA = f"with rope_theta {DEFAULT_ROPE_THETA:g}"
NO_SCALING = "without its rotary scaling"
ROUNDED = "rounded to bfloat16"


class NoCertificate(Exception):
    """A certificate cannot be computed here. The text says why."""


def certify(
    trained: TensorSource,
    written: TensorSource,
    companions: Companions,
    ends: Sequence[int],
    ai_framework: str,
    *,
    dtype: str | None = None,
    with_faults: bool,
) -> Certificate:
    """Compute a certificate.

    Args:
        trained: the model as it was trained, with its adapters next to its weights.
        written: what is written.
        companions: those that are written. Their tokenizer is the one of training.
        ends: the tokens that end an answer.
        dtype: how numbers are written, where `written` does not tell.
        with_faults: also compute what known faults would give. Each needs the model to be loaded once more.

    Raises:
        NoCertificate: there is no tokenizer, or not enough memory.
    """
    folder = companions.tokenizer_folder
    if folder is None:
        raise NoCertificate("the model has no tokenizer")
    needed, free = BYTES_PER_PARAMETER * parameter_count(trained.config) + ROOM, available_bytes()
    if needed > free:
        raise NoCertificate(
            f"computing it takes about {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free"
        )
    tokenizer = Tokenizer(folder)
    entry = prompt_entry(trained)
    probes = probes_of(tokenizer, template_from_entry(entry, tokenizer), trained.config.max_position_embeddings)
    if max((max(probe.token_ids) for probe in probes), default=0) >= trained.config.vocab_size:
        raise NoCertificate("the tokenizer has more tokens than the model")
    exact = Cast(trained, "float32")
    engine = _loaded(exact, ai_framework)
    computed, likeliest, stops = _answers(engine, probes, set(ends))
    written_dtype = dtype or dtype_name(written.dtype(EMBEDDING))
    rounds = trained.config.lora is not None or _widest(trained) != written_dtype
    del engine
    return Certificate(
        version=__version__,
        ai_framework=ai_framework,
        config=trained.config.without_adapters,
        dtype=written_dtype,
        prompt=None if entry is None else {key: entry.get(key) for key in ("prompt_type", "enable_thinking")},
        end_ids=tuple(ends),
        end_texts=tuple(tokenizer.decode([token]) for token in ends),
        probes=probes,
        training=computed,
        likeliest=likeliest,
        stops=stops,
        folder=compute(Cast(written, "float32"), probes, ai_framework) if rounds and dtype is None else None,
        alternatives={name: compute(view, probes, ai_framework) for name, view in _faulty(trained, written)}
        if with_faults
        else {},
    )


def compute(source: TensorSource, probes: Sequence[Probe], ai_framework: str) -> Computed:
    """What the weights of a source give."""
    engine = _loaded(source, ai_framework)
    return Computed(tuple(values for values, _ in engine.label_scores([_asked(probe) for probe in probes])))


def _loaded(source: TensorSource, ai_framework: str) -> Engine:
    engine = create_engine(ai_framework, source.config, EngineSettings(training=False, device="cpu"))
    engine.load_weights(source)
    return engine


def _asked(probe: Probe, rows: Sequence[int] | None = None, labels: Sequence[int] | None = None) -> AskedBatch:
    """The tokens of a probe, with each of its tokens as the label of the one before; or with labels of some rows."""
    rows = range(len(probe.token_ids) - 1) if rows is None else rows
    labels = probe.token_ids[1:] if labels is None else labels
    batch = collate([document(probe.token_ids)])
    return AskedBatch.of(batch, np.asarray(rows, np.int64), np.asarray(labels, np.int32))


def _answers(
    engine: Engine, probes: Sequence[Probe], ends: set[int]
) -> tuple[Computed, tuple[tuple[int, float], ...], tuple[bool, ...]]:
    """Log-probabilities, the likeliest token after each prompt, and whether the likeliest after an answer ends it."""
    scores = engine.label_scores([_asked(probe) for probe in probes])
    places = [len(probe.prompt_ids) - 1 for probe in probes]
    best = [int(tokens[place]) for (_, tokens), place in zip(scores, places)]
    again = engine.label_scores([_asked(probe, [row], [token]) for probe, row, token in zip(probes, places, best)])
    likeliest = tuple((token, round(float(values[0]), 6)) for token, (values, _) in zip(best, again))
    stops = tuple(
        bool(probe.messages) and int(tokens[-1]) in ends and probe.answer_ids[-1] in ends
        for probe, (_, tokens) in zip(probes, scores)
    )
    return Computed(tuple(values for values, _ in scores)), likeliest, stops


def _widest(source: TensorSource) -> str:
    """The dtype of a source with the most bytes."""
    dtypes = {source.dtype(name) for name in tensor_table(source.config)}
    return dtype_name(max(dtypes, key=lambda dtype: dtype.itemsize))


def _faulty(trained: TensorSource, written: TensorSource) -> Iterator[tuple[str, TensorSource]]:
    """By name, the model with known faults: those that it can have."""
    whole = Cast(written, "float32")
    config = whole.config
    if trained.config.lora is not None:
        yield NO_ADAPTERS, Described(Cast(trained, "float32"), config)
    if config.qk_layernorm:
        yield from ((name, _NewNorms(whole, norms)) for name, norms in NEW_NORMS.items())
        if config.model_type == "qwen3":  # without these it is a Llama
            yield NO_NORMS, Described(whole, dataclasses.replace(config, model_type="llama"))
    if config.rotary_base != DEFAULT_ROPE_THETA:
        yield DEFAULT_THETA, Described(whole, dataclasses.replace(config, rotary_base=DEFAULT_ROPE_THETA))
    if config.rotary_scaling is not None:
        yield NO_SCALING, Described(whole, dataclasses.replace(config, rotary_scaling=None))
    if dtype_name(written.dtype(EMBEDDING)) != "bfloat16":
        yield ROUNDED, Cast(Cast(written, "bfloat16"), "float32")


class _NewNorms(View):
    """A model of which some norms are one, as before training. Engines stream its weights."""

    def __init__(self, source: TensorSource, norms: tuple[str, ...]) -> None:
        super().__init__(source)
        self._norms = norms

    def stream(self, name: str, part: Part, kind: TensorKind = "model") -> Iterator[np.ndarray]:
        for rows in super().stream(name, part, kind):
            yield np.ones_like(rows) if name.endswith(self._norms) else rows
