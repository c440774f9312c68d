"""All handlers by name, and which one fits a record. A handler knows what the fields of a record mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.data.handlers.conversations import (
    AlpacaStyleInstructionHandler,
    InstructionHandler,
    OpenAIInstructionHandler,
    PromptCompletionHandler,
    SharegptStyleInstructionHandler,
)
from tandem.data.handlers.entries import parse_json
from tandem.data.handlers.preferences import (
    AlpacaStylePairwiseHandler,
    AlpacaStyleUnpairedHandler,
    OpenAIPairwiseHandler,
    OpenAIUnpairedHandler,
    PreferenceHandler,
    SharegptStylePairwiseHandler,
    SharegptStyleUnpairedHandler,
    UnpairedPreferenceHandler,
)
from tandem.data.handlers.text import AlpacaPretrainHandler, GeneralPretrainHandler, SharegptPretrainHandler
from tandem.errors import UserError, nearest

Handler = GeneralPretrainHandler | InstructionHandler

_TEXTS: dict[str, type[GeneralPretrainHandler]] = {
    handler.__name__: handler for handler in (GeneralPretrainHandler, AlpacaPretrainHandler, SharegptPretrainHandler)
}
_INSTRUCTIONS: dict[str, type[InstructionHandler]] = {
    handler.__name__: handler
    for handler in (
        AlpacaStyleInstructionHandler,
        SharegptStyleInstructionHandler,
        OpenAIInstructionHandler,
        PromptCompletionHandler,
    )
}
_PREFERENCES: dict[str, type[InstructionHandler]] = {
    handler.__name__: handler
    for handler in (
        AlpacaStylePairwiseHandler,
        SharegptStylePairwiseHandler,
        OpenAIPairwiseHandler,
        PreferenceHandler,
        AlpacaStyleUnpairedHandler,
        SharegptStyleUnpairedHandler,
        OpenAIUnpairedHandler,
        UnpairedPreferenceHandler,
    )
}
_CONVERSATIONS = {**_PREFERENCES, **_INSTRUCTIONS}  # where a record fits several, the first one counts
# Handlers of the same fields, by what the entries of messages are called: `from` and `value`, or `role` and `content`.
_BY_TAGS: dict[type[InstructionHandler], type[InstructionHandler]] = {
    SharegptStylePairwiseHandler: OpenAIPairwiseHandler,
    SharegptStyleUnpairedHandler: OpenAIUnpairedHandler,
    SharegptStyleInstructionHandler: OpenAIInstructionHandler,
}
LLAMA_FACTORY = "LlamaFactoryInstructionHandler"  # whose datasets each have a handler of their own
HANDLER_NAMES = [*_TEXTS, *_INSTRUCTIONS, *_PREFERENCES, LLAMA_FACTORY]


def make_handler(name: str, json_keys: Sequence[str] = ("text",), map_keys: Mapping[str, Any] | None = None) -> Handler:
    """The handler of a `--handler-name`; raises UserError for an unknown name."""
    check_handler_name(name)
    if name in _CONVERSATIONS:
        return _CONVERSATIONS[name](dict(map_keys or {}))
    if map_keys:
        raise UserError(f"--map-keys cannot rename the fields of {name}; leave it out, or name fields with --json-keys")
    return _TEXTS[name](tuple(json_keys)) if _TEXTS[name].is_verbatim else _TEXTS[name]()


def check_handler_name(name: str) -> None:
    """Raise UserError for an unknown name."""
    if name not in HANDLER_NAMES:
        raise UserError(f"handler {name!r}: expected one of {HANDLER_NAMES}{nearest(name, HANDLER_NAMES)}")


def detect_handler(
    record: Mapping[str, Any], json_keys: Sequence[str], map_keys: Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any] | None]:
    """The name of the handler that fits a record, and the `map_keys` to make it with.

    Preferences are tried first, then instructions, then plain text.

    >>> detect_handler({"instruction": "Hi", "output": "Hello"}, ["text"], None)
    ('AlpacaStyleInstructionHandler', None)

    Raises:
        UserError: no handler fits.
    """
    for name, handler in _CONVERSATIONS.items():
        columns = {**handler.defaults, **(map_keys or {})}
        if handler.fits(record, columns):
            for tagged, plain in _BY_TAGS.items():
                if handler in (tagged, plain):
                    return _by_tags(record, columns, map_keys, tagged, plain)
            return name, map_keys
    if all(key in record for key in json_keys):
        return GeneralPretrainHandler.__name__, map_keys
    raise UserError(
        f"fields {sorted(record)} fit no handler. Expected {list(json_keys)} (plain text), instruction and output "
        f"(alpaca), conversations (ShareGPT), messages (OpenAI), prompt and completion, chosen and rejected "
        f"(preferences). Name fields with --json-keys or --map-keys, or choose a --handler-name: "
        f"{', '.join(HANDLER_NAMES)}"
    )


def _by_tags(
    record: Mapping[str, Any],
    columns: Mapping[str, Any],
    map_keys: Mapping[str, Any] | None,
    sharegpt: type[InstructionHandler],
    openai: type[InstructionHandler],
) -> tuple[str, Mapping[str, Any] | None]:
    """ShareGPT, if `map_keys` has tags or the first message has `from`; else OpenAI."""
    column = columns["messages"]
    messages = record[column]
    if isinstance(messages, str):  # as tables have it
        messages = parse_json(messages, f"field {column!r}")
    first = messages[0] if isinstance(messages, list) and messages else None
    tagged = isinstance(first, dict) and "role" not in first and "from" in first
    handler = sharegpt if tagged or "tags" in (map_keys or {}) else openai
    renamed = {} if column == handler.defaults["messages"] else {"messages": column}
    return handler.__name__, {**(map_keys or {}), **renamed} or None
