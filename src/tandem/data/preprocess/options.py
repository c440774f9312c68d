"""The options of preprocessing, and which of them do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal

from tandem.data.handlers.fields import described
from tandem.data.handlers.registry import LLAMA_FACTORY, make_handler
from tandem.data.templates.catalog import THINKING_MODES, check_prompt_type
from tandem.errors import UserError
from tandem.options import Options, PathText


@dataclass(frozen=True)
class PreprocessOptions(Options):
    """Options of `tandem preprocess`, named as in MindSpeed-LLM's preprocess_data.py."""

    input: tuple[PathText, ...]
    """Files (.json, .jsonl, .parquet, ...), folders or patterns. With LlamaFactoryInstructionHandler: names in
    dataset_info.json, separated by commas."""
    output_prefix: PathText
    """Prefix of the files to write. A missing folder is made."""
    tokenizer_name_or_path: PathText
    """Folder of the Hugging Face tokenizer."""
    _: KW_ONLY
    tokenizer_type: Literal["PretrainedFromHF"] = "PretrainedFromHF"
    """Only PretrainedFromHF."""
    handler_name: str = ""
    """How a record is read, such as AlpacaStyleInstructionHandler; default: recognised by the first record's fields."""
    json_keys: tuple[str, ...] = ("text",)
    """Fields that hold plain text; one pair of files each."""
    map_keys: Mapping[str, Any] | None = None
    """Names of your fields, as JSON: '{"prompt": "question", "response": "answer"}'."""
    dataset_dir: PathText | None = None
    """With LlamaFactoryInstructionHandler: folder of dataset_info.json and its files."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = "concat"
    """How the datasets of LlamaFactoryInstructionHandler are mixed: one after the other (concat), in turn until one is
    used up (interleave_under), or in turn until all are used up (interleave_over)."""
    interleave_probs: tuple[float, ...] | None = None
    """With interleaving: how often each dataset is next, such as 0.7,0.3; default: in turn."""
    max_samples: int | None = None
    """Read at most so many rows of each dataset."""
    seed: int = 1234
    """Random seed of --interleave-probs."""
    prompt_type: str | None = None
    """Chat template of instruction data, such as qwen3; default: chat_template, the model's own, if it has one."""
    enable_thinking: Literal["true", "false", "none"] | None = "none"
    """Thinking mode of the template."""
    train_turns: Literal["all", "last"] = "all"
    """Which answers of a conversation are trained."""
    seq_length: int | None = None
    """Longest conversation; with --pack, the exact length of a row."""
    over_long: Literal["trim", "drop", "stop"] = "trim"
    """What to do with conversations of --seq-length tokens or more: cut them turn by turn (trim), leave them out
    (drop), or stop at the first. Preferences are never cut: trim leaves them out, too."""
    pad_to_multiple_of: int = 1
    """Plain text: pad each document to a multiple of this, with the id after the tokenizer's last id."""
    append_eod: bool = False
    """End each document with the end-of-document token."""
    eod_token: str | None = None
    """With --append-eod: this token ends documents, such as <|endoftext|>; default: the tokenizer's eos_token, or the
    token that ends a message."""
    special_tokens_in_text: Literal["encode", "text"] = "encode"
    """What a special token becomes that a text spells, such as <|im_end|>: itself (encode), or its letters (text)."""
    pack: bool = False
    """Put several conversations into a row of --seq-length."""
    neat_pack: bool = False
    """With --pack: a token attends only within its conversation."""
    workers: int = 1
    """Processes that tokenise; the result is the same with any number."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What to do with an unusable row: stop, or skip it and write it to PREFIX.rejects.jsonl."""
    log_interval: int = 1000
    """Show progress after so many documents."""

    @property
    def thinking_mode(self) -> bool | None:
        return THINKING_MODES[self.enable_thinking or "none"]

    @property
    def spells(self) -> bool:
        """Whether special tokens in texts become their letters."""
        return self.special_tokens_in_text == "text"

    def recorded(self) -> dict[str, Any]:
        """The options as a record stores them."""
        names = [field.name for field in fields(PreprocessOptions) if field.name != "tokenizer_type"]
        return {name: getattr(self, name) for name in names} | {"enable_thinking": self.thinking_mode}

    def problems(self) -> Iterator[str]:
        yield from self._wrong_handler()
        if not self.input:
            yield "--input is empty; name at least one file, folder or pattern"
        if "" in self.input:
            yield "--input: a name is empty, perhaps of an unset variable; give `.` for the current folder"
        yield from self._wrong_keys()
        yield from self._wrong_numbers()
        yield from self._wrong_lengths()
        if self.eod_token is not None and not self.append_eod:
            yield f"--eod-token {self.eod_token} needs --append-eod; give both"

    def _wrong_keys(self) -> Iterator[str]:
        if not self.json_keys:
            yield "--json-keys is empty; name at least one field, usually text"
        for key in self.json_keys:
            if "/" in key:
                yield f"--json-keys {key}: the key becomes part of a file name, so it must not contain '/'"
        if len(set(self.json_keys)) != len(self.json_keys):
            yield f"--json-keys {' '.join(self.json_keys)}: a field is named twice"
        for name, column in (self.map_keys or {}).items():
            if not isinstance(column, dict if name == "tags" else str):
                expected = "an object of names" if name == "tags" else "the name of a field"
                yield f"--map-keys: {name!r}: expected {expected}, found {described(column)}"

    def _wrong_numbers(self) -> Iterator[str]:
        for name, least in (("workers", 1), ("log_interval", 1), ("max_samples", 1), ("pad_to_multiple_of", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                yield f"--{name.replace('_', '-')} {value}: expected {least} or more"

    def _wrong_lengths(self) -> Iterator[str]:
        if self.seq_length is not None and self.seq_length < 2:
            yield f"--seq-length {self.seq_length}: expected 2 or more"
        if self.over_long != "trim" and self.seq_length is None:
            yield f"--over-long {self.over_long} needs --seq-length, the length that is too long; give both"
        if self.neat_pack and not self.pack:
            yield "--neat-pack needs --pack; give both"
        if self.pack and self.seq_length is None:
            yield "--pack needs --seq-length, the length of a packed row; give both"

    def _wrong_handler(self) -> Iterator[str]:
        try:
            if self.prompt_type is not None:
                check_prompt_type(self.prompt_type)
            if self.handler_name not in ("", LLAMA_FACTORY):
                make_handler(self.handler_name, self.json_keys, self.map_keys)
        except UserError as error:
            yield str(error)
        if self.handler_name == LLAMA_FACTORY:
            yield from self._wrong_mixing()
            return
        for name in ("dataset_dir", "interleave_probs"):
            if getattr(self, name) is not None:
                yield f"--{name.replace('_', '-')} works only with --handler-name {LLAMA_FACTORY}; leave it out"
        if self.mix_strategy != "concat":
            yield f"--mix-strategy works only with --handler-name {LLAMA_FACTORY}; leave it out"

    def _wrong_mixing(self) -> Iterator[str]:
        if self.dataset_dir is None:
            yield f"--handler-name {LLAMA_FACTORY} needs --dataset-dir, the folder of dataset_info.json"
        if self.map_keys is not None:
            yield f"--map-keys: {LLAMA_FACTORY} takes field names from dataset_info.json; leave --map-keys out"
        if (probabilities := self.interleave_probs) is None:
            return
        if self.mix_strategy == "concat":
            yield "--interleave-probs needs --mix-strategy interleave_under or interleave_over"
        if min(probabilities, default=0) <= 0 or abs(sum(probabilities) - 1) >= 1e-6:
            given = ",".join(map(str, probabilities))
            yield f"--interleave-probs {given}: expected positive numbers whose sum is 1"


@dataclass(frozen=True)
class MergeOptions(Options):
    """Options of merging datasets that were preprocessed in parts."""

    input: PathText
    """Folder with the parts."""
    output_prefix: PathText
    """Each group becomes OUTPUT_PREFIX_KEY.bin/.idx."""
    merge_group_keys: tuple[str, ...]
    """For each key, merge all pairs of files whose names contain the key."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition`."""
    if not condition:
        raise UserError(message)
