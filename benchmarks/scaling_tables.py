"""The tables of docs/lab/layouts.md: what `tandem plan --devices` finds, for Qwen3's sizes and for numbers of devices.

python benchmarks/scaling_tables.py            print the page with its tables as they are now
python benchmarks/scaling_tables.py --write    put it in place
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tandem.cli.plan import PLAN_COLUMNS, plan_cells
from tandem.models.published import QWEN3_SIZES, qwen3_config
from tandem.planning.hardware import HARDWARE
from tandem.planning.job import Job
from tandem.planning.search import Plan, suggest

PAGE = Path(__file__).resolve().parents[1] / "docs/lab/layouts.md"
# A table stands between `<!-- table: NAME ARGUMENT... -->` and `<!-- end -->`.
TABLE = re.compile(r"(<!-- table: (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

SEQ_LENGTH = 4096
NODE, NODE_BATCH = 8, 256
DEVICES, CLUSTER_BATCH = [2**power for power in range(3, 14)], 2048


def best(size: str, hardware: str, devices: int, global_batch_size: int) -> Plan | None:
    base = Job(config=qwen3_config(size), half=True, seq_length=SEQ_LENGTH, global_batch_size=global_batch_size)
    plans, _ = suggest(base, HARDWARE[hardware], devices)
    return plans[0] if plans else None


def sizes(hardware: str) -> list[list[str]]:
    """Each size on eight devices, and the smallest power of two of devices that it fits."""
    rows = []
    for size in QWEN3_SIZES:
        fewest = next(n for n in (1, *(2**k for k in range(1, 14))) if best(size, hardware, n, NODE_BATCH))
        rows.append([size, str(fewest), *cells(best(size, hardware, NODE, NODE_BATCH))])
    return [["model", "fits from", *PLAN_COLUMNS], *rows]


def devices(size: str, hardware: str) -> list[list[str]]:
    """One size on 8 to 8192 devices, the global batch unchanged."""
    rows = [[f"{count:,}", *cells(best(size, hardware, count, CLUSTER_BATCH))] for count in DEVICES]
    return [["devices", *PLAN_COLUMNS], *rows]


def cells(plan: Plan | None) -> list[str]:
    return plan_cells(plan) if plan else ["does not fit", *[""] * (len(PLAN_COLUMNS) - 1)]


TABLES = {"sizes": sizes, "devices": devices}


def markdown(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_new_tables(page: str) -> str:
    def table(match: re.Match[str]) -> str:
        start, name, arguments, end = match.groups()
        return start + markdown(TABLES[name](*arguments.split())) + end

    return TABLE.sub(table, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page")
    arguments = parser.parse_args()
    page = with_new_tables(PAGE.read_text(encoding="utf-8"))
    if arguments.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
