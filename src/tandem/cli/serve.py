"""`tandem serve`: a model behind OpenAI's protocol, with a page to chat with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from tandem.cli.arguments import parse
from tandem.cli.processes import run_as_processes
from tandem.config.settings import Settings
from tandem.errors import UserError
from tandem.server.options import ServeOptions

DESCRIPTION = (
    "Serve a model: a Hugging Face folder or a checkpoint of any layout. /v1 speaks OpenAI's protocol: chat, "
    "completions, streaming, tools, log-probabilities. / is a page to chat with it."
)
FIRST = (
    *("load", "lora_load", "compare", "served_model_name", "host", "port", "api_key"),
    *("max_batch_size", "max_waiting", "max_tokens", "max_body_mb", "timeout_graceful_shutdown"),
    *("prompt_type", "enable_thinking", "tokenizer_name_or_path", "ckpt_step"),
    *("ai_framework", "device", "bf16", "tensor_model_parallel_size", "nproc_per_node"),
)
NEEDED = ("starlette", "uvicorn")


def run(argv: Sequence[str]) -> int:
    options = parse(ServeOptions, "serve", DESCRIPTION, argv, first=FIRST)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"tandem serve needs {' and '.join(missing)}: pip install 'tandem-llm[serve]'")
    settings = Settings(launch=options.launch, ai_framework=options.model.ai_framework)
    if (code := run_as_processes("serve", argv, settings)) is not None:
        return code
    from tandem.server.run import serve  # needs them

    serve(options)
    return 0
