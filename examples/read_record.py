"""Show the records of runs as a table: python examples/read_record.py FILE_OR_FOLDER ...

The standard library is enough. docs/metrics.md explains every key.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("name", "status", "decode tok/s", "prefill tok/s", "share of the limit", "GB on GPU", "GB in host memory")


def records(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Every `result.json` among files and folders, oldest first."""
    files = [found for path in paths for found in (path.rglob("result.json") if path.is_dir() else [path])]
    yield from sorted((json.loads(file.read_text()) for file in files), key=lambda each: each["run"]["started_at"])


def row(record: dict[str, Any]) -> list[str]:
    """The cells of one run. `metrics` is null unless the run is ok, and `plan` is null if it was refused."""
    metrics, plan = record["metrics"] or {}, record["plan"]
    placement = plan["placement"] if plan else {}
    share = metrics.get("fraction_of_bound")
    return [
        record["run"]["name"],
        record["status"],
        _number(metrics.get("decode_tok_per_s")),
        _number(metrics.get("prefill_tok_per_s")),
        f"{share:.0%}" if share is not None else "",
        *(_number(placement[name] / 1e9 if placement else None) for name in ("gpu_bytes", "cpu_bytes")),
    ]


def _number(value: float | None) -> str:
    return f"{value:,.4g}" if value is not None else ""


def main() -> None:
    found = list(records([Path(each) for each in sys.argv[1:]]))
    if not found:
        sys.exit("no result.json there: pass the folder of a run or of a sweep")
    table = [list(COLUMNS), *map(row, found)]
    widths = [max(len(line[index]) for line in table) for index in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for record in found:
        if record["error"]:
            print(f"{record['run']['name']}: {record['error']['message']}")


if __name__ == "__main__":
    main()
