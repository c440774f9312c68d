"""Tensor names with a prefix that wrappers leave (`_orig_mod.`, `module.`), or without the `model.` of a bare model."""

from __future__ import annotations

from collections.abc import Mapping

from tandem.checkpoints.hf.weights import StoredTensor
from tandem.models.weight_map import HF_EMBEDDING, LM_HEAD

BODY = "model."  # what the names of all tensors but the head begin with
EMBEDDING = HF_EMBEDDING.removeprefix(BODY)


def prefix_of(tensors: Mapping[str, StoredTensor]) -> str | None:
    """What stands in place of `model.` in names of tensors; None where the embedding does not tell.

    >>> prefix_of({"_orig_mod.model.embed_tokens.weight": None})
    '_orig_mod.model.'
    >>> prefix_of({"embed_tokens.weight": None})
    ''
    """
    if HF_EMBEDDING in tensors:
        return BODY
    prefixes = [name.removesuffix(EMBEDDING) for name in tensors if name.endswith(EMBEDDING)]
    return prefixes[0] if len(prefixes) == 1 and (prefixes[0] == "" or prefixes[0].endswith(".")) else None


def without_prefix(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face's names. Names that do not begin with the prefix stay as they are.

    Args:
        prefix: as `prefix_of` gives it.
    """
    return {_renamed(name, prefix): tensor for name, tensor in tensors.items()}


def _renamed(name: str, prefix: str) -> str:
    if name in (LM_HEAD, prefix.removesuffix(BODY) + LM_HEAD):
        return LM_HEAD
    return BODY + name.removeprefix(prefix) if name.startswith(prefix) else name
