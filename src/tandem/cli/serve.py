"""`tandem serve`: a model behind OpenAI's protocol, with a page to chat with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.errors import UserError
from tandem.server.options import ServeOptions

DESCRIPTION = (
    "Serve a model: a Hugging Face folder or a checkpoint of any layout. /v1 speaks OpenAI's protocol: chat, "
    "completions, streaming, tools, log-probabilities. / is a page to chat with it."
)
NEEDED = ("starlette", "uvicorn")


def run(argv: Sequence[str]) -> None:
    options = parse(ServeOptions, "serve", DESCRIPTION, argv)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"tandem serve needs {' and '.join(missing)}: pip install 'tandem-llm[serve]'")
    from tandem.server.run import serve  # needs them

    serve(options)
