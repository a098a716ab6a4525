"""Draws result files: python -m benchmarks.plot benchmarks/results/<device>/<commit>.jsonl [--out folder]

One picture for each op: for every workload the time of each provider as a multiple of the limit that was measured in
the same run, forward and backward together. The lower the bar, the better; 1 is the limit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .records import Row, op_rows

FAMILIES = {"mlhead": "tab:blue", "papers": "tab:gray", "torch": "tab:orange", "compile": "tab:green"}


def draw(rows: list[Row], op: str, path: Path) -> None:
    """The picture of one op; the last row of a provider and workload counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {(row["title"], row["provider"]): row for row in rows}
    titles = list(dict.fromkeys(title for title, _ in timed))
    figure, axes = pyplot.subplots(len(titles), 1, figsize=(8, 2.2 * len(titles)), squeeze=False, layout="constrained")
    for axis, title in zip(axes[:, 0], titles, strict=True):
        mine = sorted(
            (row for (t, _), row in timed.items() if t == title), key=lambda row: row["p50_ms"] / row["limit_ms"]
        )
        colours = [FAMILIES.get(row["provider"].split(" ")[0].rstrip(":"), "tab:red") for row in mine]
        values = [row["p50_ms"] / row["limit_ms"] for row in mine]
        bars = axis.barh([row["provider"] for row in mine], values, color=colours)
        axis.bar_label(bars, [f"{row['p50_ms']:.3g} ms" for row in mine], padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("time / limit, forward and backward")
    first = rows[0]
    figure.suptitle(f"{op} on {first['device']}, commit {first['commit']}", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="folder; default: beside the first results file")
    options = parser.parse_args(arguments)
    rows = [row for path in options.results for row in op_rows(path)]
    rows = [row for row in rows if row["pass"] == "both" and row["p50_ms"] is not None]
    if not rows:
        parser.error("no timed rows in " + ", ".join(map(str, options.results)))
    folder = options.out or options.results[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        path = folder / f"{options.results[0].stem}-{op}.png"
        draw([row for row in rows if row["op"] == op], op, path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
