"""A small server of OpenAI's protocol, over transformers: several folders, each a model of its name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM, AutoTokenizer


class Served:
    """A folder, as transformers opens it. `dtype`: what it computes in."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, ids: list[int], most: int, bias: Mapping[str, float]) -> tuple[list[int], str]:
        ids, written = list(ids), list[int]()
        while len(written) < most:
            row = self.log_probabilities(ids)[-1]
            for token, value in bias.items():
                row[int(token)] += value
            token = int(row.argmax())
            if token in self.ends:
                return written, "stop"
            ids.append(token)
            written.append(token)
        return written, "length"


@contextmanager
def serving(models: Mapping[str, Served], *, logprobs: str = "echo", tokenize: bool = False) -> Iterator[str]:
    """The address of a server that runs in a thread.

    Args:
        logprobs: `echo` or `prompt_logprobs`: which of both ways of asking for those of a prompt it knows; or none.
        tokenize: whether it has vLLM's `/tokenize`.
    """

    async def completions(request: Request) -> JSONResponse:
        body = await request.json()
        served, ids = models[body["model"]], body["prompt"]
        written, reason = served.answer(ids, body["max_tokens"], body.get("logit_bias") or {})
        choice: dict[str, Any] = {"text": served.tokenizer.decode(written), "finish_reason": reason, "index": 0}
        values = served.log_probabilities(ids)
        if logprobs == "echo" and body.get("echo"):
            values = [None, *(float(values[n, token]) for n, token in enumerate(ids[1:]))]
            choice["logprobs"] = {"token_logprobs": [*values, *([-1.0] * len(written))]}
        if logprobs == "prompt_logprobs" and "prompt_logprobs" in body:
            entries = [{str(token): {"logprob": float(values[n, token])}} for n, token in enumerate(ids[1:])]
            choice["prompt_logprobs"] = [None, *entries]
        return JSONResponse({"choices": [choice]})

    async def chat(request: Request) -> JSONResponse:
        body = await request.json()
        served = models[body["model"]]
        ids = served.prompt(body["messages"])
        best = float(served.log_probabilities(ids)[-1].max())
        content = {"content": [{"logprob": best}]} if body.get("logprobs") else None
        return JSONResponse({"choices": [{"logprobs": content}], "usage": {"prompt_tokens": len(ids)}})

    async def tokens(request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse({"tokens": models[body["model"]].prompt(body["messages"])})

    async def listed(request: Request) -> JSONResponse:
        if request.headers.get("authorization", "Bearer right") != "Bearer right":
            return JSONResponse({"error": {"message": "no"}}, 401)
        return JSONResponse({"data": [{"id": name, "root": str(served.folder)} for name, served in models.items()]})

    routes = [
        Route("/v1/models", listed),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        *([Route("/tokenize", tokens, methods=["POST"])] if tokenize else []),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
