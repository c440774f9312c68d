"""Memory for keys and values: how many tokens fit into it, and what is said before it is taken."""

from __future__ import annotations

from tandem.backends.interface import Engine


def tokens_that_fit(engine: Engine, share: float) -> int:
    """How many tokens' keys and values a share of the free memory holds."""
    return int(engine.free_memory() * share) // engine.bytes_per_cached_token()


def memory_notice(engine: Engine, tokens: int, what: str) -> str:
    """How much memory the keys and values of so many tokens may take; `what` they are."""
    return f"keys and values: up to {tokens * engine.bytes_per_cached_token() / 1e6:,.0f} MB for {what}"
