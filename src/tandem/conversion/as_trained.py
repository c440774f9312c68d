"""`tandem export`: any checkpoint as a Hugging Face folder that loads, and that asks and stops as in its training."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tandem.checkpoints.copy import Progress
from tandem.checkpoints.detect import open_source
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorSource, dtype_name
from tandem.checkpoints.prompt import prompt_entry
from tandem.conversion.convert import Check, Converted, companions_for, with_one_dtype, write_checked
from tandem.conversion.options import ExportOptions
from tandem.data.templates.catalog import template_from_entry
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.chat_template import render_chat_template
from tandem.data.tokens.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer
from tandem.errors import UserError
from tandem.models.tensors import EMBEDDING

# Before a chat template: what it takes `enable_thinking` for where nobody says.
THINKING_DEFAULT = "{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {} %}}{{%- endif %}}"


def export(options: ExportOptions, progress: Progress | None = None, check: Check | None = None) -> Converted:
    """Write the folder; it appears whole or not at all.

    Args:
        check: what it raises keeps the folder from appearing.

    Raises:
        UserError: the checkpoint is damaged, the target exists, or the tokenizer lacks the template's end token.
    """
    source = open_source(options.load, options.ckpt_step)
    companions, notices = as_trained(source, companions_for(source, options.hf_cfg_dir))
    source = with_one_dtype(source, options.params_dtype)
    folder, dtype = Path(options.save_dir), dtype_name(source.dtype(EMBEDDING))
    write_checked(folder, source, lambda work: HFSink(work, source.config, dtype, companions), progress, check)
    return Converted.of(folder, None, source.config, notices)


def as_trained(source: TensorSource, companions: Companions) -> tuple[Companions, list[str]]:
    """The companions of a fine-tuned model such that whoever uses them asks as in training and stops as in training; of
    any other model, as they are. With them, what the user should be told.

    Raises:
        UserError: the tokenizer lacks the template's end token.
    """
    folder = companions.tokenizer_folder
    entry, tokenizer = prompt_entry(source), Tokenizer(folder) if folder else None
    template = template_from_entry(entry, tokenizer)
    if template is None or tokenizer is None or companions.hf_config is None:
        return companions, []
    companions = ending_turns(companions, tokenizer.require_id(template.stop_word), template.stop_word)
    chat_template = asking_as(template, tokenizer)
    if chat_template is None:
        return companions, [
            f"the chat template of the tokenizer writes another prompt than --prompt-type {template.name}, which the "
            f"model was fine-tuned on: `tandem generate --load {source.location}` asks as in training"
        ]
    if chat_template != tokenizer.chat_template:
        companions = _with_chat_template(companions, chat_template)
    return companions, []


def asking_as(template: Template, tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat template, with the default of `enable_thinking` that makes it begin an answer as `template`
    does; None when no default does."""
    question = "x"
    trained = "".join(template.generation_prompt([Message("user", question)]))
    own = tokenizer.chat_template or ""
    for default in ("", THINKING_DEFAULT.format("false"), THINKING_DEFAULT.format("true")):
        with suppress(UserError):
            message = {"role": "user", "content": question}
            given = {"messages": [message], "add_generation_prompt": True, **tokenizer.chat_variables}
            if render_chat_template(default + own, **given) == trained:
                return default + own
    return None


def ending_turns(companions: Companions, end: int, stop_word: str) -> Companions:
    """Make the template's end token the model's, so that `generate()` stops after a turn; a former end token stays
    as a second one."""
    assert companions.hf_config is not None
    generation = _json(companions, "generation_config.json")
    former = generation.get("eos_token_id", companions.hf_config.get("eos_token_id"))
    others = former if isinstance(former, list) else [former]
    ends = [end, *(token for token in others if token not in (None, end))]
    changed = {"generation_config.json": {**generation, "eos_token_id": ends if len(ends) > 1 else end}}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # older tokenizers follow the second
        if content := _json(companions, name):
            changed[name] = {**content, "eos_token": stop_word}
    return dataclasses.replace(
        companions,
        hf_config={**companions.hf_config, "eos_token_id": end},
        texts={**companions.texts, **{name: _text(value) for name, value in changed.items()}},
    )


def _with_chat_template(companions: Companions, chat_template: str) -> Companions:
    """It stands in a file of its own, or in `tokenizer_config.json`, alone or as one of several."""
    if any(path.name == CHAT_TEMPLATE_FILE for path in companions.files):
        changed = {CHAT_TEMPLATE_FILE: chat_template}
    else:
        config = _json(companions, "tokenizer_config.json")
        if isinstance(config["chat_template"], list):
            others = [entry for entry in config["chat_template"] if entry["name"] != "default"]
            config["chat_template"] = [{"name": "default", "template": chat_template}, *others]
        else:
            config["chat_template"] = chat_template
        changed = {"tokenizer_config.json": _text(config)}
    return dataclasses.replace(companions, texts={**companions.texts, **changed})


def _json(companions: Companions, name: str) -> dict[str, Any]:
    """What a file says, as far as it is known to be changed; nothing without one."""
    if name in companions.texts:
        return dict(json.loads(companions.texts[name]))
    paths = [path for path in companions.files if path.name == name]
    return dict(json.loads(paths[0].read_text(encoding="utf-8"))) if paths else {}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
