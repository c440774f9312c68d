"""Errors call settings as they are typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import tandem
from tandem.config.settings import Settings
from tandem.conversion.options import ConvertOptions
from tandem.options import options_of
from tandem.planning.options import PlanOptions

ROOT = Path(tandem.__file__).parent
SETTINGS = {name for kind in (Settings, ConvertOptions, PlanOptions) for name in options_of(kind) if "_" in name}
# Messages that name a field of a file, a column or a keyword, and no flag.
NO_FLAGS = {
    "api.py": {"valid_data_path"},
    "checkpoints/megatron/args.py": {"add_qkv_bias", "moe_layer_freq", "num_experts", "qk_layernorm"},
    "checkpoints/megatron/source.py": {"lora_alpha"},
    "conversion/gguf.py": {"beta_fast", "beta_slow"},
    "data/templates/named.py": {"enable_thinking"},
    "models/config.py": {"kv_channels", "num_attention_heads", "num_layers", "num_query_groups"},
    "models/experts.py": {"moe_router_topk", "norm_topk_prob", "num_experts"},
    "parallel/layout.py": {"moe_ffn_hidden_size"},
    "planning/job.py": {"max_position_embeddings"},
    "training/start/weights.py": {"max_position_embeddings", "norm_topk_prob"},
}


def messages(tree: ast.Module) -> Iterator[str]:
    """The literal texts of the errors that a module raises, and of the problems that it yields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _name(node.exc.func) == "UserError":
            parts = [*node.exc.args]
        elif isinstance(node, ast.Yield) and node.value is not None:
            parts = [node.value]
        else:
            continue
        yield " ".join(_literals(parts))


def _literals(parts: list[ast.expr]) -> Iterator[str]:
    """Texts of expressions, without those that are arguments of `describe` and its like."""
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif not isinstance(part, ast.Call):
            yield from _literals([child for child in ast.iter_child_nodes(part) if isinstance(child, ast.expr)])


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else ""


def test_messages_name_flags_as_they_are_typed() -> None:
    named: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        for text in messages(ast.parse(path.read_text(encoding="utf-8"))):
            words = set(re.findall(r"(?<![\w.-])[a-z]+(?:_[a-z0-9]+)+", text)) & SETTINGS
            if words:
                named.setdefault(str(path.relative_to(ROOT)), set()).update(words)
    assert named == NO_FLAGS
