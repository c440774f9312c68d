"""The page about a benchmark: one file that can be sent."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
td, th { border-bottom: 1px solid #8884; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
.failed { color: #b00020; white-space: pre-wrap; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } .failed { color: #ff8a80; } }
"""


def page(record: Mapping[str, Any]) -> str:
    """HTML of the results, as `bench.json` holds them."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>tandem bench</title><style>{STYLE}</style></head><body><h1>tandem bench</h1>",
        _table(record["versions"]),
        "<h2>Options</h2>",
        _table(record["options"]),
    ]
    for stage in record["stages"]:
        parts.append(f"<h2>{escape(stage['name'])}</h2><p>{escape(stage['shows'])}, {stage['wall_seconds']:.1f} s</p>")
        failed = f'<p class="failed">{escape(stage["error"])}</p>'
        parts.append(failed if stage["figures"] is None else _table(stage["figures"]))
    return "\n".join([*parts, "</body></html>\n"])


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(shown(name, value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def shown(name: str, value: Any) -> str:
    """A figure as people read it.

    >>> shown("memory", 3 * 2**30), shown("MFU", 0.412), shown("tokens/s", 12345.6)
    ('3.00 GiB', '41.2%', '12,346')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("memory"):
        return f"{value / 2**30:.2f} GiB"
    if name == "MFU":
        return f"{value:.1%}"
    if name.startswith("tokens/s"):
        return f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown('', part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown("", part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
