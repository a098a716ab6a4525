"""Launch configurations that were measured beside the shipped ones: rows of kind "tune" as one table."""

from __future__ import annotations

from ..records import Row
from .rows import by_dtype, grouped, timed
from .tables import commit_column, message_of, number, provenance, sizes_of, table


def trials(rows: list[Row]) -> list[tuple[Row, list[Row]]]:
    """The shipped configuration's newest row of each site and shape, and the others that were timed in its run.

    A run writes the shipped one first: what is older is of another run, and is not compared.
    """
    found = []
    ordered = sorted(
        rows,
        key=lambda r: (
            r["site"],
            by_dtype(r["dtype"]),
            r["workload"],
            str(r["dims"]),
            r["pass"],
            r["time"],
            r["written"],
        ),
    )
    for group in grouped(ordered, "site", "dtype", "workload", "dims", "pass").values():
        shipped = [row for row in group if row["shipped"]]
        if shipped:
            newest = shipped[-1]
            rest = [row for row in group if row["time"] >= newest["time"] and row is not newest]
            found.append((newest, rest))
    return found


def tune_section(rows: list[Row]) -> list[str]:
    """The best measured candidate of every site and shape against the shipped configuration."""
    found = trials(rows)
    used = [row for shipped, rest in found for row in (shipped, *rest)]
    lines, notes, commits = [], [], commit_column(used)
    for shipped, rest in found:
        right = [row for row in rest if timed(row)]
        best = min(right, key=lambda row: (row["p50_ms"], row["written"]), default=None)
        gain = "-"
        if best and timed(shipped):
            clear = best["p80_ms"] < shipped["p20_ms"] or best["p20_ms"] > shipped["p80_ms"]
            gain = f"{100 * (1 - best['p50_ms'] / shipped['p50_ms']):.1f} %{'' if clear else ' ?'}"
        shape = f"`{shipped['workload']}` {sizes_of(shipped['dims'])} {shipped['dtype']}"
        lines.append(
            [
                f"`{shipped['site']}`", shape, shipped["pass"], number(shipped["p50_ms"]) if timed(shipped) else "-",
                f"`{best['written']}`" if best else "-", number(best["p50_ms"]) if best else "-", gain,
                str(len(right)), commits([shipped, *rest]),
            ]
        )  # fmt: skip
        for row in rest:
            if row["status"] != "ok":
                about = f"* `{row['site']}`, `{row['workload']}` {row['dtype']} {row['pass']}, `{row['written']}`"
                notes.append(f"{about}: {row['status']}: `{message_of(row)}`")
    if not lines:
        return []
    heads = ["site", "shape", "pass", "shipped ms", "best candidate", "its ms", "gain", "candidates", "commit"]
    return [
        "### Launch configurations",
        "",
        *provenance(used),
        "The shipped configuration, and the fastest of the others that gave its results and were timed in the same",
        'run. A gain with "?" is within the spread of both; below zero the shipped one is the faster. The best of many',
        "noisy times flatters itself.",
        "",
        *table(heads, lines),
        *([*notes, ""] if notes else []),
    ]
