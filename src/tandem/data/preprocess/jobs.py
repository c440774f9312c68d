"""The job of the workers of preprocessing, for each kind of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tandem.data.handlers.conversations import InstructionHandler
from tandem.data.handlers.preferences import AnswersHandler
from tandem.data.handlers.text import GeneralPretrainHandler
from tandem.data.kinds import CONVERSATIONS, KINDS, PREFERENCES, TEXT, UNPAIRED, Kind
from tandem.data.preprocess.answers import AnswersTokenizer
from tandem.data.preprocess.chunks import ChunkTokenizer, PretrainTokenizer
from tandem.data.preprocess.dialogues import InstructionTokenizer
from tandem.data.preprocess.options import PreprocessOptions, require
from tandem.data.sources.sources import Source
from tandem.data.templates.catalog import get_template
from tandem.data.templates.messages import CHAT_TEMPLATE, Template
from tandem.data.tokens.encoder import TokenizersEngine
from tandem.data.tokens.special import SpecialTokens
from tandem.data.tokens.tokenizer import Tokenizer
from tandem.options import flag_of

Job = tuple[ChunkTokenizer, Template | None]  # with the template of conversations


def job_of(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> Job:
    """The job of the workers for these sources.

    Raises:
        UserError: an option is not for this kind of data, or the tokenizer does not have a token that is needed.
    """
    kind = sources[0].handler.kind
    for source in sources:
        require(
            source.handler.kind is kind,
            f"{source.files[0]}: {source.handler_name} reads {source.handler.kind.name}, and {sources[0].handler_name} "
            f"reads {kind.name}; preprocess them apart",
        )
    _require_used(options, kind, sources[0].handler_name)
    return _JOBS[kind](options, sources, tokenizer)


def _require_used(options: PreprocessOptions, kind: Kind, handler_name: str) -> None:
    """Raise UserError if an option is given that is for other kinds of data."""
    for field in dataclasses.fields(options):
        if field.name in kind.unused_by_preprocess:
            users = " or ".join(other.name for other in KINDS if field.name not in other.unused_by_preprocess)
            require(
                getattr(options, field.name) == field.default,
                f"{flag_of(field.name)} is for {users}, but {handler_name} reads {kind.name}; leave it out",
            )


def _text_job(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> Job:
    handler = sources[0].handler
    assert isinstance(handler, GeneralPretrainHandler)
    require(
        not options.append_eod or options.eod_token is not None or tokenizer.eos_id is not None,
        f"--append-eod: {tokenizer.folder} names no end token: neither eos_token in tokenizer_config.json, nor "
        f"eos_token_id in generation_config.json or config.json; give --eod-token",
    )
    job = PretrainTokenizer(
        TokenizersEngine(tokenizer, PretrainTokenizer.adds_special_tokens),
        SpecialTokens(tokenizer),
        options.spells,
        handler,
        _end(options, tokenizer, tokenizer.eos_id),
        options.pad_to_multiple_of,
        pad=len(tokenizer),  # upstream's choice
    )
    return job, None


def _conversation_job(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> Job:
    template, stop = _template(options, sources, tokenizer)
    require(
        not options.pack or tokenizer.pad_id is not None,
        f"--pack: {tokenizer.folder} names no padding token; set pad_token in tokenizer_config.json",
    )
    handlers = [source.handler for source in sources if isinstance(source.handler, InstructionHandler)]
    job = InstructionTokenizer(
        TokenizersEngine(tokenizer, add_special_tokens=False),
        SpecialTokens(tokenizer),
        options.spells,
        handlers,
        template,
        options.seq_length,
        tokenizer.encode(template.answer_header),
        _end(options, tokenizer, stop),
        options.train_turns,
        options.over_long,
    )
    return job, template


def _answers_job(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> Job:
    template, _ = _template(options, sources, tokenizer)
    job = AnswersTokenizer(
        TokenizersEngine(tokenizer, add_special_tokens=False),
        SpecialTokens(tokenizer),
        options.spells,
        [source.handler for source in sources if isinstance(source.handler, AnswersHandler)],
        template,
        options.seq_length,
        options.over_long,
    )
    return job, template


def _end(options: PreprocessOptions, tokenizer: Tokenizer, usual: int | None) -> int | None:
    """The token that ends each document; None without --append-eod."""
    if not options.append_eod:
        return None
    if options.eod_token is None:
        return usual
    token_id = tokenizer.token_to_id(options.eod_token)
    require(token_id is not None, f"--eod-token {options.eod_token}: is not a token of {tokenizer.folder}")
    return token_id


def _template(options: PreprocessOptions, sources: Sequence[Source], tokenizer: Tokenizer) -> tuple[Template, int]:
    """The template of messages, and the id of the token that ends one."""
    template = template_of(options, tokenizer, sources[0].handler_name)
    stop = tokenizer.token_to_id(template.stop_word)
    require(
        stop is not None,
        f"--prompt-type {template.name} ends messages with {template.stop_word}, which is not a token of "
        f"{tokenizer.folder}; choose the --prompt-type of this model",
    )
    assert stop is not None
    return template, stop


def template_of(options: PreprocessOptions, tokenizer: Tokenizer, handler_name: str) -> Template:
    """The template of --prompt-type; without one the model's own.

    Raises:
        UserError: there is neither.
    """
    require(
        options.prompt_type is not None or tokenizer.chat_template is not None,
        f"{handler_name} needs --prompt-type, a template for conversations, such as qwen3; "
        f"{tokenizer.lack_of_template}",
    )
    return get_template(options.prompt_type or CHAT_TEMPLATE, options.thinking_mode, tokenizer)


_JOBS: dict[Kind, Callable[[PreprocessOptions, Sequence[Source], Tokenizer], Job]] = {
    TEXT: _text_job,
    CONVERSATIONS: _conversation_job,
    PREFERENCES: _answers_job,
    UNPAIRED: _answers_job,
}
