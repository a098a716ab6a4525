"""All tables of one device."""

from __future__ import annotations

from ..records import Row
from .end_to_end import end_to_end_section
from .overhead import overhead_section
from .rows import kind_of
from .tables import head_section, memory_section, op_section, table9_section
from .tune import tune_section

SECTIONS = {
    "head": head_section,
    "end_to_end": end_to_end_section,
    "overhead": overhead_section,
    "table": table9_section,
    "memory": memory_section,
    "tune": tune_section,
}


def device_sections(rows: list[Row]) -> list[str]:
    """All tables of one device; rows are the newest."""
    text = []
    ops = [row for row in rows if kind_of(row) == "op"]
    for op in sorted({row["op"] for row in ops}):
        text += op_section(op, [row for row in ops if row["op"] == op])
    for kind, section in SECTIONS.items():
        mine = [row for row in rows if kind_of(row) == kind]
        text += section(mine) if mine else []
    return text
