"""What a call costs on small inputs: rows of kind "overhead" as a table, mlhead beside plain PyTorch."""

from __future__ import annotations

from typing import Any

from ..records import Row
from .rows import by_dtype, grouped, provider_rank
from .tables import commit_column, message_of, number, provenance, sizes_of, table

MODES = ("eager", "compiled", "CUDA graph")


def clocks(row: Row) -> tuple[str, ...]:
    """The clocks that say something of a row, the first one first: on a CPU a call returns when its work is done."""
    return ("wall", "thread") if row["includes_work"] else ("host", "wall", "thread")


def clocked(row: Row) -> bool:
    """Whether a row has times that count."""
    return row["status"] == "ok" and all(row[f"{clock}_us"] for clock in clocks(row))


def calls(rows: list[Row]) -> list[list[Row]]:
    """What is compared: rows of one op or head, dtype, pass and mode. Each run measures all providers in its modes."""

    def rank(row: Row) -> tuple[Any, ...]:
        mode = MODES.index(row["mode"]) if row["mode"] in MODES else len(MODES)
        return (
            by_dtype(row["dtype"]), row["subject_is"] != "op", row["subject"], str(row["dims"]),
            row["pass"] != "forward", mode, row["mode"], provider_rank(row["provider"]),
        )  # fmt: skip

    same = ("subject_is", "subject", "workload", "dims", "dtype", "pass", "mode")
    return list(grouped(sorted(rows, key=rank), *same).values())


def name_of(row: Row) -> str:
    """The op or head of a row, with its dtype."""
    return f"{'head ' if row['subject_is'] == 'head' else ''}`{row['subject']}` {row['dtype']}"


def _cells(row: Row | None, least: float | None) -> dict[str, str]:
    """Median times by clock; of the first clock the spread too."""
    if row is None:
        return {}
    if not clocked(row):
        return {clocks(row)[0]: row["status"]}
    cells = {clock: number(row[f"{clock}_us"]["p50"]) for clock in clocks(row)}
    first, t = clocks(row)[0], row[f"{clocks(row)[0]}_us"]
    bold = "**" if t["p50"] == least else ""
    cells[first] = f"{bold}{cells[first]}{bold} ({number(t['p20'])} to {number(t['p80'])})"
    return cells


def overhead_section(rows: list[Row]) -> list[str]:
    """Microseconds a call, mlhead beside plain PyTorch in the same mode."""
    lines, notes, commits = [], [], commit_column(rows)
    shown = clocks(rows[0])
    for group in calls(rows):
        for row in group:
            if row["status"] != "ok":
                about = f"* {name_of(row)}, {row['pass']}, {row['provider']}, {row['mode']}"
                notes.append(f"{about}: {row['status']}: `{message_of(row)}`")
        ours = next((row for row in group if row["provider"].startswith("mlhead")), None)
        others = [row for row in group if not row["provider"].startswith("mlhead")]
        # What stands for plain PyTorch may have changed: the newest counts.
        plain = max(others, key=lambda row: (row["time"], row["provider"]), default=None)
        times = [row[f"{shown[0]}_us"]["p50"] for row in (ours, plain) if row and clocked(row)]
        least = min(times, default=None)
        mine, theirs = _cells(ours, least), _cells(plain, least)
        backend = (ours or {}).get("backend")
        lines.append(
            [
                name_of(group[0]), group[0]["pass"], group[0]["mode"] + (f", {backend}" if backend else ""),
                *(mine.get(clock, "-") for clock in shown), plain["provider"] if plain else "-",
                *(theirs.get(clock, "-") for clock in shown),
                f"{times[1] / times[0]:.2f}" if len(times) == 2 else "-", commits(group),
            ]
        )  # fmt: skip
    sizes: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["subject_is"] != "op", row["subject"])):
        names = sizes.setdefault(f"`{row['workload']}` {sizes_of(row['dims'])}", [])
        names += [f"`{row['subject']}`"] if f"`{row['subject']}`" not in names else []
    work = [
        '"wall" is until a call returns, "thread" what the calling thread computes meanwhile. On a CPU a call returns',
        "when its work is done: it is in all times.",
    ]
    host = [
        '"host" is until a call returns, without synchronisation, "wall" until the work of several calls in a row is',
        'done, "thread" what the calling thread computes meanwhile; the backward runs in a thread of its own.',
    ]
    columns = [f"{clock} us" for clock in shown]
    heads = ["what", "pass", "mode", *(f"mlhead {name}" for name in columns)]
    return [
        "### Overhead of a call",
        "",
        *provenance(rows),
        "Microseconds a call on small inputs, medians, of the first clock with p20 to p80; mlhead beside plain PyTorch",
        'in the same mode. "Forward" is without gradients, "both" forward and backward to all inputs and parameters.',
        *(work if rows[0]["includes_work"] else host),
        "A loss gets sparse targets in mlhead and dense ones in plain PyTorch. Sizes:",
        "",
        *(f"* {text}: {', '.join(names)}" for text, names in sizes.items()),
        "",
        *table([*heads, "plain PyTorch", *columns, "times mlhead's", "commit"], lines),
        *([*dict.fromkeys(notes), ""] if notes else []),
    ]
