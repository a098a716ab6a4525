"""The log of a run: JSON lines for programs, CSV for spreadsheets; both go on exactly where a resumed run begins."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from mlhead.checkpoints import write_atomically
from mlhead.metrics import ACCURACY, NAMES, TOP_K

COLUMNS = (
    "kind",
    "step",
    "epoch",
    "loss",
    "lr",
    "lr_head",
    "grad_norm",
    "images_per_s",
    "data_wait",
    "time_s",
    *NAMES,
    *ACCURACY,
    *TOP_K,
)


class RunLog:
    """Appends records to log.jsonl and log.csv in a folder.

    Args:
        folder: of the run.
        resume_step: None for a new run, which empties the logs; else records past this step are dropped, since the
            resumed run will write them again.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self.json_path, self.csv_path = folder / "log.jsonl", folder / "log.csv"
        kept = [r for r in read_log(self.json_path) if r["step"] <= resume_step] if resume_step is not None else []
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        table = _csv_line(COLUMNS) + "".join(_csv_line(record.get(c, "") for c in COLUMNS) for record in kept)
        write_atomically(self.json_path, lambda file: file.write(lines.encode()))
        write_atomically(self.csv_path, lambda file: file.write(table.encode()))

    def add(self, kind: str, step: int, **values: Any) -> None:
        """One record; `kind` is "train" or "val"."""
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        unknown = record.keys() - set(COLUMNS)
        assert not unknown, f"no column for {unknown}"
        with self.json_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        with self.csv_path.open("a", encoding="utf-8") as file:
            file.write(_csv_line(record.get(column, "") for column in COLUMNS))


def _finite(value: Any) -> Any:
    """A number as JSON has it: None for what is not finite, such as the norm of gradients that overflow in fp16."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv_line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a kill cut short is left out, any other bad line is an error."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records
