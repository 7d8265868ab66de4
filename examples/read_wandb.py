"""Show what W&B wrote of an offline run, without a server: python examples/read_wandb.py FOLDER_OR_FILE

The file is a header of 7 bytes, then blocks of 32 KiB. A block holds pieces, each with a checksum (4 bytes), a length
(2 bytes) and a kind (1 byte): a whole record, or the first, a middle, or the last piece of one. A record is a protobuf
message.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER_BYTES = 7  # of the file, and of each piece
BLOCK_BYTES = 32 * 1024
FULL, LAST = 1, 4  # kinds; 0 fills the end of a block, 2 and 3 are the first and the middle pieces


def records(data: bytes) -> Iterator[Any]:
    """Every record in the bytes of a `.wandb` file; a last one that was not written to its end is left out."""
    at, parts = HEADER_BYTES, b""
    while at + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if left < HEADER_BYTES or kind == 0:  # no piece begins here: the next block
            at += left
            continue
        at += HEADER_BYTES
        if at + length > len(data):
            return
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read(path: Path) -> dict[str, Any]:
    """Name, configuration, history (a row for each call of `log`) and summary of a run."""
    run: dict[str, Any] = {"name": None, "config": {}, "history": [], "summary": {}}
    for record in records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run["name"] = record.run.display_name
            run["config"].update(_values(record.run.config.update))
        elif kind == "history":
            run["history"].append(_values(record.history.item))
        elif kind == "summary":
            run["summary"].update(_values(record.summary.update))
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def find(path: Path) -> Path:
    """The file itself, or the newest one in a folder."""
    found = sorted(path.rglob("run-*.wandb"), key=lambda each: each.stat().st_mtime) if path.is_dir() else [path]
    if not found:
        sys.exit(f"no .wandb file in {path}: pass the folder of a run with tracking.mode=offline")
    return found[-1]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/read_wandb.py FOLDER_OR_FILE")
    run = read(find(Path(sys.argv[1])))
    print(f"{run['name']}: {len(run['history'])} rows of history")
    print("choices: " + " ".join(f"{group}={choice}" for group, choice in run["config"]["choices"].items()))
    for name, value in sorted(run["summary"].items()):
        print(f"  {name} = {value}")


if __name__ == "__main__":
    main()
