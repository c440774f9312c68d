"""The options of preprocessing, and what they exclude."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.handlers.fields import kind
from tandem.data.handlers.registry import LLAMA_FACTORY, make_handler
from tandem.data.preprocess.mixing import MIX_STRATEGIES
from tandem.data.templates.catalog import check_prompt_type
from tandem.errors import UserError


@dataclass(frozen=True)
class PreprocessOptions:
    """Settings of `preprocess`, by upstream's flag names.

    Attributes:
        input: files, directories and glob patterns.
        output_prefix: of the files written; its folder must exist.
        tokenizer_name_or_path: a Hugging Face folder.
        handler_name: how a record is read; "" looks at the fields of the first record.
        json_keys: fields of plain text, one `.bin/.idx` pair each.
        map_keys: other field names for an instruction handler.
        dataset_dir: with `LlamaFactoryInstructionHandler`, the folder with dataset_info.json, whose datasets `input`
            names.
        mix_strategy: how those are mixed: "concat", or "interleave_under" until one is used up, or "interleave_over"
            until all are.
        interleave_probs: of each dataset to be next when they are interleaved; None takes them in turn.
        max_samples: read only so many rows, of each dataset.
        seed: of the interleaving.
        prompt_type: the template of fine-tuning data.
        enable_thinking: thinking mode of that template.
        train_turns: which answers of a conversation are trained: "all" or only the "last".
        seq_length: fine-tuning: conversations have one token less at most, and packed rows exactly this length.
            None leaves all as they are.
        over_long: "trim" conversations that are longer, turn by turn, "drop" them as upstream does, or "stop". Pairs
            are never trimmed, but dropped.
        pad_to_multiple_of: plain text: each document is padded to a multiple of this, with an id beyond the vocabulary.
        append_eod: put the end-of-document token after each document.
        pack: fill rows of seq_length with several conversations.
        neat_pack: and number them in the attention mask, so that they do not see each other.
        workers: processes that tokenise; the output does not depend on it.
        on_bad: "stop" at the first unusable row, or "skip" it into `{output_prefix}.rejects.jsonl`.
        log_interval: documents between calls of the progress callback.
    """

    input: tuple[str, ...]
    output_prefix: str
    tokenizer_name_or_path: str
    handler_name: str = ""
    json_keys: tuple[str, ...] = ("text",)
    map_keys: Mapping[str, Any] | None = None
    dataset_dir: str | None = None
    mix_strategy: str = "concat"
    interleave_probs: tuple[float, ...] | None = None
    max_samples: int | None = None
    seed: int = 1234
    prompt_type: str | None = None
    enable_thinking: bool | None = None
    train_turns: str = "all"
    seq_length: int | None = None
    over_long: str = "trim"
    pad_to_multiple_of: int = 1
    append_eod: bool = False
    pack: bool = False
    neat_pack: bool = False
    workers: int = 1
    on_bad: str = "stop"
    log_interval: int = 1000

    def __post_init__(self) -> None:
        self._check_handler()
        if self.prompt_type is not None:
            check_prompt_type(self.prompt_type)
        require(bool(self.input), "input is empty; name at least one file, directory or pattern")
        require("" not in self.input, "input: an empty name, perhaps of an unset variable; the current folder is `.`")
        require(bool(self.json_keys), "json_keys is empty; name at least one field, usually text")
        for key in self.json_keys:
            require("/" not in key, f"json_keys: {key!r} becomes part of a file's name, which holds no '/'")
        require(len(set(self.json_keys)) == len(self.json_keys), f"json_keys {self.json_keys}: a field is named twice")
        require(self.workers >= 1, f"workers is {self.workers}; expected 1 or more")
        require(self.log_interval >= 1, f"log_interval is {self.log_interval}; expected 1 or more")
        require(self.train_turns in ("all", "last"), f"train_turns is {self.train_turns!r}; expected 'all' or 'last'")
        require(
            self.over_long in ("trim", "drop", "stop"),
            f"over_long is {self.over_long!r}; expected 'trim', 'drop' or 'stop'",
        )
        require(self.on_bad in ("stop", "skip"), f"on_bad is {self.on_bad!r}; expected 'stop' or 'skip'")
        require(self.seq_length is None or self.seq_length >= 2, f"seq_length is {self.seq_length}; expected 2 or more")
        require(
            self.over_long == "trim" or self.seq_length is not None,
            f"over_long {self.over_long} needs seq_length, which says what is too long",
        )
        require(not self.neat_pack or self.pack, "neat_pack needs pack; give both")
        require(not self.pack or self.seq_length is not None, "pack needs seq_length, the length of a packed row")
        require(
            self.enable_thinking is None or self.prompt_type is not None,
            "enable_thinking needs prompt_type, the template whose thoughts it governs",
        )
        require(
            self.max_samples is None or self.max_samples >= 1, f"max_samples is {self.max_samples}; expected 1 or more"
        )
        require(self.pad_to_multiple_of >= 1, f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected 1 or more")

    def _check_handler(self) -> None:
        if self.handler_name == LLAMA_FACTORY:
            require(self.dataset_dir is not None, f"{LLAMA_FACTORY} needs dataset_dir, the folder of dataset_info.json")
            require(self.map_keys is None, f"map_keys: {LLAMA_FACTORY} takes its field names from dataset_info.json")
            self._check_mixing()
            return
        for name in ("dataset_dir", "interleave_probs"):
            require(getattr(self, name) is None, f"{name} is for {LLAMA_FACTORY}; give handler_name")
        require(self.mix_strategy == "concat", f"mix_strategy is for {LLAMA_FACTORY}; give handler_name")
        if self.handler_name:
            make_handler(self.handler_name, self.json_keys, self.map_keys)

    def _check_mixing(self) -> None:
        require(
            self.mix_strategy in MIX_STRATEGIES,
            f"mix_strategy is {self.mix_strategy!r}; expected one of {', '.join(MIX_STRATEGIES)}",
        )
        if (probabilities := self.interleave_probs) is None:
            return
        require(self.mix_strategy != "concat", "interleave_probs needs mix_strategy interleave_under or _over")
        require(
            min(probabilities, default=0) > 0 and abs(sum(probabilities) - 1) < 1e-6,
            f"interleave_probs {probabilities}: expected positive numbers whose sum is 1",
        )


def parse_map_keys(text: str | None) -> dict[str, Any] | None:
    """`--map-keys` as it is written on a command line."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--map-keys {text!r} is not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"--map-keys {text!r}: expected a JSON object of names")
    for name, column in value.items():
        expected = "an object of names" if name == "tags" else "the name of a field"
        if not isinstance(column, dict if name == "tags" else str):
            raise UserError(f"--map-keys {text!r}: {name!r} is {kind(column)}, expected {expected}")
    return value


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition`."""
    if not condition:
        raise UserError(message)
