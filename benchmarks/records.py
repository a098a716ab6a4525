"""Result files: one JSON object on each line, only ever appended to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def op_rows(path: Path) -> list[Row]:
    """The rows of single ops: a file may also hold those of whole heads and of Table 9."""
    return [row for row in read_rows(path) if "op" in row]


def append_rows(path: Path, rows: list[Row]) -> None:
    """Adds rows to a results file, on lines of their own even after one cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut_short + "".join(json.dumps(row) + "\n" for row in rows))
