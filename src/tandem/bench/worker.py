"""One stage in a process of its own: `python -m tandem.bench.worker FILE`. The file says which, and gets the result."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tandem.bench.options import BenchOptions
from tandem.bench.stages import stages
from tandem.options import build


def main(path: str) -> int:
    file = Path(path)
    asked = json.loads(file.read_text(encoding="utf-8"))
    options = build(BenchOptions, asked["options"])
    (stage,) = (stage for stage in stages(options) if stage.name == asked["stage"])
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"figures": stage.run(options)}
    except Exception as error:  # noqa: BLE001 - whatever a device does is a result
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    result["wall_seconds"] = time.perf_counter() - start
    file.write_text(json.dumps(result, default=float), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
