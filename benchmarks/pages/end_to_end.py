"""Whole models: rows of kind "end_to_end" as tables, the share of the head before and after."""

from __future__ import annotations

import re
from typing import Any

from ..records import Row
from .rows import MODEL, by_dtype, grouped, run_of, timed
from .tables import commit_column, message_of, number, provenance, table

BEFORE, AFTER, IN_HEAD = "before", "after", "after, loss in the head"
VARIANTS = (BEFORE, AFTER, IN_HEAD)


def models(rows: list[Row]) -> list[list[Row]]:
    """What is compared: rows of one model, pass and head."""

    def rank(row: Row) -> tuple[Any, ...]:
        return (
            by_dtype(row["dtype"]), row["image_size"], row["batch"], row["backbone"], row["classes"],
            row["pass"] != "training", row["head_name"] or "",
        )  # fmt: skip

    return list(grouped(sorted(rows, key=rank), *MODEL, "pass", "head_name").values())


def _time(row: Row | None, least: float | None) -> str:
    if row is None:
        return "-"
    if not timed(row):
        return row["status"]
    bold = "**" if row["p50_ms"] == least else ""
    return f"{bold}{number(row['p50_ms'])}{bold} ({number(row['p20_ms'])} to {number(row['p80_ms'])})"


def _share(row: Row | None) -> str:
    """The head's part; with a question mark where it does not stand out of the spread."""
    if row is None or row["share"] is None:
        return "-"
    return f"{100 * row['share']:.1f} %{'' if row['resolved'] else ' ?'}"


def _line(group: list[Row], commit: str) -> list[str]:
    found = {row["variant"]: row for row in group}
    least = min((row["p50_ms"] for row in group if timed(row)), default=None)
    before, after = found.get(BEFORE, {}), found.get(AFTER, {})
    paired = timed(before) and timed(after) and run_of(before) == run_of(after)
    peaks = [found.get(variant, {}).get("peak_mib") for variant in VARIANTS]
    first = group[0]
    cells = [f"`{first['backbone']}`, {first['classes']:,} classes", first["pass"], f"`{first['head_name']}`"]
    for variant in VARIANTS:
        cells += [_time(found.get(variant), least), _share(found.get(variant))]
    return [
        *cells, f"{before['p50_ms'] / after['p50_ms']:.2f}" if paired else "-",
        " / ".join(number(peak) for peak in peaks) if any(peaks) else "-", commit,
    ]  # fmt: skip


def _about(rows: list[Row]) -> list[str]:
    first = rows[0]
    reduced = {name: text for row in rows for name, text in (row.get("reduced") or {}).items()}
    text = f"{first['dtype']}, images of {first['image_size']}, batch {first['batch']}"
    text += "".join(f"; **not as in the papers: {name.replace('_', ' ')} {value}**" for name, value in reduced.items())
    sources = dict.fromkeys(f"`{r['backbone']}` of {r['backbone_from']}" for r in rows if r.get("backbone_from"))
    options: dict[str, None] = {}
    for row in rows:
        if row.get("head_options"):
            given = re.sub(r"in_features=\d+, num_classes=\d+(, )?", "", row["head_options"])
            options[f"`{row['head_name']}({given})`"] = None
    lines = [f"{text}.", f"Backbones: {', '.join(sources)}." if sources else ""]
    return [*(line for line in [*lines, f"Heads: {', '.join(options)}." if options else ""] if line), ""]


def _notes(rows: list[Row]) -> list[str]:
    """What went wrong, a line for all rows of a model that say the same."""
    lines = []
    for mine in grouped(rows, "backbone", "classes").values():
        said: dict[str, list[str]] = {}
        for row in mine:
            if row["status"] != "ok":
                which = " ".join(filter(None, (row["pass"], row["head_name"], row["variant"])))
                said.setdefault(f"{row['status']}: `{message_of(row)}`", []).append(which)
        for text, names in said.items():
            named = "" if len(names) == len(mine) else f" {'; '.join(names)}:"
            lines.append(f"* `{mine[0]['backbone']}`, {mine[0]['classes']:,} classes:{named} {text}")
    return [*lines, ""] if lines else []


def end_to_end_section(rows: list[Row]) -> list[str]:
    """Milliseconds of a training step and of inference with each head, and the head's part of it."""
    text = [
        "### Whole models, end to end",
        "",
        *provenance(rows),
        "Milliseconds of a training step (forward, mean binary cross-entropy, backward, SGD with momentum) and of",
        'inference, medians with p20 to p80, the fastest bold. "Before" is the papers\' formulation, "after" mlhead',
        "with the same parameters. A head's share is what the whole takes beyond the backbone alone in the same run;",
        '"?" where it does not stand out of the spread of both.',
        "",
    ]
    ordered = sorted(rows, key=lambda row: (by_dtype(row["dtype"]), row["image_size"], row["batch"]))
    for mine in grouped(ordered, "dtype", "image_size", "batch").values():
        commits = commit_column(mine)
        found = models(mine)
        lines, alone = [], []
        for group in found:
            if group[0]["head_name"] is None:
                row = group[-1]
                alone.append([f"`{row['backbone']}`, {row['classes']:,} classes", row["pass"], _time(row, None)])
            else:
                lines.append(_line(group, commits(group)))
        heads = ["model", "pass", "head", "before ms", "its share", "after ms", "its share", "loss in the head ms"]
        heads += ["its share", "before/after", "peak MiB: before / after / loss in the head", "commit"]
        text += _about([row for group in found for row in group])
        text += table(heads, lines) if lines else []
        text += ["The backbone alone:", "", *table(["model", "pass", "ms"], alone)] if alone else []
        text += _notes([row for group in found for row in group])
    return text


def variants(group: list[Row]) -> dict[str, Row]:
    """The rows of one model, pass and head by the names of providers."""
    names = {BEFORE: "papers", AFTER: "mlhead", IN_HEAD: "mlhead, loss in the head"}
    return {names[row["variant"]]: row for row in group if row["variant"] in names}


def label(row: Row) -> str:
    """A row's model and head on one line."""
    sizes = f"images of {row['image_size']}, batch {row['batch']}"
    return f"`{row['backbone']}` with `{row['head_name']}`, {row['classes']:,} classes, {sizes}, {row['dtype']}"
