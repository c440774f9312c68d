"""Rendering of a model's Jinja chat template, in a sandbox, with the helper functions of transformers."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import UserError

GENERATION_MARKS = "\ue002", "\ue003"  # characters of private use, which no template writes
MARK_GENERATION = "tandem_marks_generation"  # the variable that asks for them


def render_chat_template(source: str, **variables: Any) -> str:
    """The text that a chat template writes for `variables` (`messages`, `add_generation_prompt`, ...).

    With the variable `MARK_GENERATION`, `GENERATION_MARKS` enclose what a model writes: what is between
    `{% generation %}` and `{% endgeneration %}`.

    >>> render_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}",
    ...                      messages=[{"role": "user", "content": "Hi"}])
    'user: Hi;'

    Raises:
        UserError: the template is malformed, or rejects the messages (`raise_exception`).
    """
    try:
        return _compile(source).render(**variables)
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # of foreign code
        raise UserError(f"the chat template cannot render these messages: {error}") from None


class _Generation(Extension):
    """The tag `{% generation %}`, with which transformers marks answers."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: Context, caller: Macro) -> str:
        begin, end = GENERATION_MARKS if context.get(MARK_GENERATION) else ("", "")
        return f"{begin}{caller()}{end}"


@lru_cache
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's filter escapes HTML characters. No model was trained on such text.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
