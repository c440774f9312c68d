"""`certificate.json`: what it holds, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem.checkpoints.folders import TRACKER
from tandem.checkpoints.hf.record import CERTIFICATE
from tandem.errors import UserError
from tandem.files.real import check_folder, check_real
from tandem.files.text import read_json
from tandem.models.config import ModelConfig

FORM = 1  # of the file; readers refuse others
DIGITS = 6  # of log-probabilities


@dataclass(frozen=True)
class Probe:
    """A prompt with a short answer.

    Attributes:
        messages: the conversation, in Hugging Face's form; empty when the prompt is plain text.
        text: the plain text; empty when the prompt is a conversation.
        prompt_ids: its tokens as training renders it.
        answer_ids: the answer's, the end token of a conversation's last.
    """

    messages: tuple[dict[str, str], ...]
    text: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.answer_ids

    @property
    def title(self) -> str:
        """How messages call it."""
        text = self.text or self.messages[-1]["content"]
        return repr(text if len(text) <= 40 else f"{text[:37]}...")


def log_probabilities(logits: np.ndarray, probe: Probe) -> np.ndarray:
    """Of each token of a probe after the first, float64 [tokens - 1], from logits [tokens, vocabulary]."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    tokens = np.asarray(probe.token_ids[1:])
    return rows[np.arange(len(tokens)), tokens] - np.log(np.exp(rows).sum(axis=-1))


@dataclass(frozen=True)
class Computed:
    """What somebody computes on the probes.

    Attributes:
        log_probabilities: for each probe, of each token after the first, float64 [tokens - 1].
    """

    log_probabilities: tuple[np.ndarray, ...]

    def distance(self, other: Computed) -> np.ndarray:
        """The absolute differences, of all tokens."""
        pairs = zip(self.log_probabilities, other.log_probabilities, strict=True)
        return np.abs(np.concatenate([left - right for left, right in pairs]))


@dataclass(frozen=True)
class Certificate:
    """What training computes.

    Attributes:
        config: the model's, without adapters.
        dtype: of the numbers in the folder.
        prompt: `--prompt-type` and thinking mode of the fine-tuning; None without one.
        end_ids: the tokens that end an answer.
        end_texts: the same as texts.
        training: what training computes, in fp32.
        likeliest: for each probe, the token that is likeliest after the prompt, and its log-probability.
        stops: for each probe, whether the likeliest token after the answer's text ends it.
        folder: what the folder's own numbers give, where writing them rounded; else None.
        alternatives: what would be computed with known faults, by name of the fault.
    """

    version: str
    ai_framework: str
    config: ModelConfig
    dtype: str
    prompt: Mapping[str, Any] | None
    end_ids: tuple[int, ...]
    end_texts: tuple[str, ...]
    probes: tuple[Probe, ...]
    training: Computed
    likeliest: tuple[tuple[int, float], ...]
    stops: tuple[bool, ...]
    folder: Computed | None = None
    alternatives: Mapping[str, Computed] = field(default_factory=dict)

    @property
    def token_count(self) -> int:
        return sum(len(probe.token_ids) for probe in self.probes)

    def to_text(self) -> str:
        """The content of the file."""
        probes = [
            {
                **({"messages": probe.messages} if probe.messages else {"text": probe.text}),
                "prompt_ids": probe.prompt_ids,
                "answer_ids": probe.answer_ids,
                "log_probabilities": _rounded(self.training.log_probabilities[number]),
                "likeliest_after_prompt": self.likeliest[number],
                "stops_after_answer": self.stops[number],
            }
            for number, probe in enumerate(self.probes)
        ]
        content = {
            "form": FORM,
            "written_by": f"tandem {self.version}",
            "computed_by": f"{self.ai_framework}, in float32",
            "model": self.config.to_dict(),
            "dtype": self.dtype,
            "prompt": self.prompt,
            "end_tokens": dict(zip(self.end_texts, self.end_ids, strict=True)),
            "probes": probes,
            "as_written": None if self.folder is None else _lists(self.folder),
            "with_known_faults": {name: _lists(computed) for name, computed in self.alternatives.items()},
        }
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {_on_lines(value)}" for key, value in content.items()) + "\n}\n"


def read_certificate(place: Path) -> Certificate:
    """The certificate in an exported folder, or in the file itself.

    Raises:
        UserError: there is none, it is damaged, or another version of Tandem must read it.
    """
    if place.name != CERTIFICATE:
        check_folder(place, "a folder that `tandem export` wrote, or the certificate.json in it")
    path = place / CERTIFICATE if place.is_dir() else place
    check_real(path)
    if not path.exists():
        raise UserError(_without_certificate(path.parent))
    content = read_json(path)
    if not isinstance(content, dict) or "form" not in content:
        raise UserError(f"{path}: not a certificate of Tandem: export again")
    if content["form"] != FORM:
        raise UserError(f"{path}: form {content['form']!r}, expected {FORM}: export again with this version of Tandem")
    try:
        return _from_content(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error!r}. Copy it again, or export again") from error


def _without_certificate(folder: Path) -> str:
    """What a folder is that has no certificate, and what helps."""
    if not folder.exists():
        return f"{folder} does not exist: expected a folder that `tandem export` wrote"
    if (folder / TRACKER).exists():
        return f"{folder} is a run, which is not verified: export it first: tandem export {folder} NEW_FOLDER"
    return (
        f"{folder} holds no {CERTIFICATE}: only `tandem export` writes it. Export again without --no-certificate: "
        f"tandem export {folder} NEW_FOLDER"
    )


def _from_content(content: dict[str, Any]) -> Certificate:
    probes = content["probes"]
    ends = content["end_tokens"]
    framework = content["computed_by"].partition(",")[0]
    certificate = Certificate(
        version=content["written_by"].removeprefix("tandem "),
        ai_framework=framework,
        config=ModelConfig.from_dict(content["model"]),
        dtype=content["dtype"],
        prompt=content["prompt"],
        end_ids=tuple(ends.values()),
        end_texts=tuple(ends),
        probes=tuple(
            Probe(
                messages=tuple(probe.get("messages", ())),
                text=probe.get("text", ""),
                prompt_ids=tuple(probe["prompt_ids"]),
                answer_ids=tuple(probe["answer_ids"]),
            )
            for probe in probes
        ),
        training=_computed([probe["log_probabilities"] for probe in probes]),
        likeliest=tuple((int(token), float(value)) for token, value in (p["likeliest_after_prompt"] for p in probes)),
        stops=tuple(bool(probe["stops_after_answer"]) for probe in probes),
        folder=None if content["as_written"] is None else _computed(content["as_written"]),
        alternatives={name: _computed(lists) for name, lists in content["with_known_faults"].items()},
    )
    for computed in (certificate.training, certificate.folder, *certificate.alternatives.values()):
        if computed is not None:
            computed.distance(certificate.training)  # raises when lengths differ
    for probe, values in zip(certificate.probes, certificate.training.log_probabilities, strict=True):
        if len(values) != len(probe.token_ids) - 1:
            raise ValueError(f"{len(values)} log-probabilities for {len(probe.token_ids)} tokens")
    return certificate


def _on_lines(value: Any) -> str:
    """JSON with a line for each of a list's members."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(member, ensure_ascii=False) for member in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), DIGITS) for value in values]


def _lists(computed: Computed) -> list[list[float]]:
    return [_rounded(values) for values in computed.log_probabilities]


def _computed(lists: list[list[float]]) -> Computed:
    return Computed(tuple(np.asarray(values, np.float64) for values in lists))
