"""`tandem export`: any checkpoint as a Hugging Face folder whose model is asked, and stops, as in its training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from tandem.checkpoints.adapters.views import merged
from tandem.checkpoints.copy import Progress
from tandem.checkpoints.detect import open_with_adapters
from tandem.checkpoints.hf.companions import companion_json, end_ids_of
from tandem.checkpoints.hf.record import recorded
from tandem.checkpoints.hf.sink import HFSink
from tandem.checkpoints.interface import Companions, TensorSource, dtype_name
from tandem.checkpoints.prompt import prompt_entry
from tandem.checkpoints.views import Cast
from tandem.conversion.adapters import describe_merge, export_adapters
from tandem.conversion.convert import (
    Check,
    Converted,
    config_of,
    left_out,
    notices_of_dtype,
    with_one_dtype,
    with_origin,
    write_checked,
)
from tandem.conversion.gguf import check_gguf, file_name, write_gguf
from tandem.conversion.lacking import what_lacks
from tandem.conversion.options import ExportOptions
from tandem.data.templates.catalog import template_from_entry
from tandem.data.templates.messages import Message, Template
from tandem.data.tokens.chat_template import render_chat_template
from tandem.data.tokens.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer
from tandem.errors import UserError
from tandem.files.lock import publishing
from tandem.models.end_tokens import GENERATION_CONFIG
from tandem.models.tensors import EMBEDDING

SERVING = ("tandem serve {}", "vllm serve {}", "python -m sglang.launch_server --model-path {}")
SERVING_GGUF = "llama-server -m {}"
# Put before a chat template: the value of `enable_thinking` when the caller gives none.
THINKING_DEFAULT = "{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {} %}}{{%- endif %}}"


# called with the unpublished folder, the model as it was trained, what is written, and its companions; returns notices
Certify = Callable[[Path, TensorSource, TensorSource, Companions], list[str]]


def export(
    options: ExportOptions,
    progress: Progress | None = None,
    check: Check | None = None,
    certify: Certify | None = None,
) -> Converted:
    """Write the folder. It appears whole or not at all.

    Args:
        check: compares source and result. When it raises, the folder does not appear.
        certify: adds a certificate.

    Raises:
        UserError: the checkpoint is damaged, the target exists, or the tokenizer lacks the template's end token.
    """
    config = config_of(options.hf_cfg_dir) if options.hf_cfg_dir else None
    stored = open_with_adapters(options.load, options.ckpt_step, options.lora_load, config=config)
    if options.save_lora_to_hf:
        return export_adapters(stored, Path(options.save_dir), as_trained)
    # merging in the dtype that is written rounds once
    exact = options.gguf or options.params_dtype == "fp32"
    unmerged = Cast(stored, "float32") if exact and stored.config.lora is not None else stored
    source, companions, notices = with_origin(merged(unmerged), options.hf_cfg_dir)
    companions, more = as_trained(source, recorded(companions))
    notices = [*stored.notices, *notices, *more, *describe_merge(stored), *what_lacks(companions, source.config)]
    if options.gguf:
        return _export_gguf(options, stored, source, companions, notices, progress, certify)
    source = with_one_dtype(source, options.params_dtype)
    notices += notices_of_dtype(source, companions, options.params_dtype)
    folder, dtype = Path(options.save_dir), dtype_name(source.dtype(EMBEDDING))

    def finish(source: TensorSource, result: TensorSource) -> None:
        if check:
            check(source, result)
        if certify and result.folder is not None:
            notices.extend(certify(result.folder, stored, source, companions))

    write_checked(folder, source, lambda work: HFSink(work, source.config, dtype, companions), progress, finish)
    result = Converted.of(folder, None, source.config, [*left_out(source), *notices])
    return dataclasses.replace(result, serving=tuple(command.format(quote(str(folder))) for command in SERVING))


def _export_gguf(
    options: ExportOptions,
    stored: TensorSource,
    source: TensorSource,
    companions: Companions,
    notices: list[str],
    progress: Progress | None,
    certify: Certify | None,
) -> Converted:
    assert options.gguf is not None
    folder, verification = Path(options.save_dir), ""
    with publishing(folder) as work:
        notices += write_gguf(work, source, companions, options.gguf, progress)
        if not options.no_verify:
            verification = check_gguf(work, source, options.gguf)
        if certify:
            notices += certify(work, stored, source, companions)
    path = folder / file_name(folder, options.gguf)
    result = Converted.of(path, None, source.config, [*left_out(source), *notices])
    serving = (SERVING_GGUF.format(quote(str(path))),)
    return dataclasses.replace(result, verification=verification, what="GGUF model", serving=serving)


def as_trained(source: TensorSource, companions: Companions) -> tuple[Companions, list[str]]:
    """Companions with which a fine-tuned model is asked, and stops, as in its training; and notices for the user.

    The companions of any other model stay as they are.

    Raises:
        UserError: the tokenizer lacks the template's end token.
    """
    entry, folder = prompt_entry(source), companions.tokenizer_folder
    if entry is None or folder is None or companions.hf_config is None:
        return companions, []
    tokenizer = Tokenizer(folder)
    template = template_from_entry(entry, tokenizer)
    assert template is not None, "an entry names its template"
    end = tokenizer.require_id(template.stop_word)
    companions = ending_turns(companions, end, template.stop_word, tokenizer.end_ids)
    chat_template = asking_as(template, tokenizer)
    if chat_template is None:
        return companions, [
            f"the model was fine-tuned with --prompt-type {template.name}, and the tokenizer's chat template writes "
            f"another prompt: `tandem generate --load {source.location}` asks as in training"
        ]
    if chat_template != tokenizer.chat_template:
        companions = _with_chat_template(companions, chat_template)
    return companions, []


def asking_as(template: Template, tokenizer: Tokenizer) -> str | None:
    """The tokenizer's chat template, changed so that it begins an answer as `template` does.

    The change is a default for `enable_thinking`. None when no default gives the same beginning.
    """
    question = "x"
    trained = "".join(template.generation_prompt([Message("user", question)]))
    chat_template = tokenizer.chat_template or ""
    for default in ("", THINKING_DEFAULT.format("false"), THINKING_DEFAULT.format("true")):
        with suppress(UserError):
            message = {"role": "user", "content": question}
            variables = {"messages": [message], "add_generation_prompt": True, **tokenizer.chat_variables}
            if render_chat_template(default + chat_template, **variables) == trained:
                return default + chat_template
    return None


def ending_turns(companions: Companions, end: int, stop_word: str, former: Sequence[int] = ()) -> Companions:
    """Make the template's end token the model's, so that `generate()` stops after a turn.

    The end tokens that the model had before, of which `former` are the tokenizer's, stay as further ones.
    """
    assert companions.hf_config is not None
    generation = companion_json(companions, GENERATION_CONFIG)
    ends = list(dict.fromkeys((end, *end_ids_of(companions), *former)))
    changed = {GENERATION_CONFIG: {**generation, "eos_token_id": ends if len(ends) > 1 else end}}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # older tokenizers follow the second
        if content := companion_json(companions, name):
            changed[name] = {**content, "eos_token": stop_word}
    return dataclasses.replace(
        companions,
        hf_config={**companions.hf_config, "eos_token_id": end},
        texts={**companions.texts, **{name: _text(value) for name, value in changed.items()}},
    )


def _with_chat_template(companions: Companions, chat_template: str) -> Companions:
    """Put a chat template where the old one is: in its own file, or in `tokenizer_config.json`, alone or in a list."""
    if any(path.name == CHAT_TEMPLATE_FILE for path in companions.files):
        changed = {CHAT_TEMPLATE_FILE: chat_template}
    else:
        config = companion_json(companions, "tokenizer_config.json")
        if isinstance(config["chat_template"], list):
            named = [entry for entry in config["chat_template"] if entry["name"] != "default"]
            config["chat_template"] = [{"name": "default", "template": chat_template}, *named]
        else:
            config["chat_template"] = chat_template
        changed = {"tokenizer_config.json": _text(config)}
    return dataclasses.replace(companions, texts={**companions.texts, **changed})


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
