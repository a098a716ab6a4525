"""Draws result files: python -m benchmarks.plot benchmarks/results/<device>/<commit>.jsonl [--out folder]

One picture for each op: for every workload the time of each provider as a multiple of the limit that was measured in
the same run, forward and backward together. The lower the bar, the better; 1 is the limit. The other pictures here are
those of docs/performance.md: time and memory against the number of classes, and Table 9.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .records import Row, op_rows

FAMILIES = {"mlhead": "tab:blue", "papers": "tab:gray", "torch": "tab:orange", "compile": "tab:green"}
SHADES = {"mlhead": "Blues", "papers": "Greys", "torch": "Oranges", "compile": "Greens"}
# The heads of Table 9.
SHADES |= {"ml_decoder": "Blues", "gap": "Greens", "transformer_decoder": "Oranges"}
# What decides which workloads lie on one line; the other sizes go with the number of classes, or are told.
FREE_SIZES = ("B", "C", "G", "H", "positives")

# Values by category and provider, e.g. {"C=80": {"torch: bmm": 1.5}}.
Panel = Mapping[str, Mapping[str, float]]


def family(provider: str) -> str:
    """The part of a provider's name that gives its colour."""
    return provider.split(" ")[0].rstrip(":,")


def colours(providers: Iterable[str]) -> dict[str, Any]:
    """A shade of its family's colour for each provider."""
    from matplotlib import colormaps

    found: dict[str, Any] = {}
    for name in SHADES:
        mine = [provider for provider in providers if family(provider) == name]
        shades = colormaps[SHADES[name]]
        found |= {
            p: shades(0.85 - 0.5 * i / max(1, len(mine) - 1) if len(mine) > 1 else 0.75) for i, p in enumerate(mine)
        }
    rest = [provider for provider in providers if provider not in found]
    return found | {provider: colormaps["Set2"](i % 8) for i, provider in enumerate(rest)}


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _figure(rows: int, height: float, **more: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, 1, figsize=(9, height * rows), squeeze=False, layout="constrained", **more)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def commits(rows: list[Row]) -> str:
    """The commits of rows in words, in the order of the rows."""
    names = dict.fromkeys(str(row["commit"]) + " (dirty)" * bool(row.get("dirty")) for row in rows)
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


def draw(rows: list[Row], op: str, path: Path) -> None:
    """The picture of one op against the limit; the last row of a provider and workload counts."""
    latest = {(row["title"], row["provider"]): row for row in rows}
    titles = list(dict.fromkeys(title for title, _ in latest))
    most = max(sum(t == title for t, _ in latest) for title in titles)
    figure, axes = _figure(len(titles), 0.8 + 0.2 * most, sharex=True)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        mine = sorted(
            (row for (t, _), row in latest.items() if t == title), key=lambda row: row["p50_ms"] / row["limit_ms"]
        )
        values = [row["p50_ms"] / row["limit_ms"] for row in mine]
        colour = [FAMILIES.get(family(row["provider"]), "tab:red") for row in mine]
        bars = axis.barh([row["provider"] for row in mine], values, color=colour)
        axis.bar_label(bars, [f"{_plain(row['p50_ms'])} ms" for row in mine], padding=3, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8, labelbottom=True)
    axes[-1, 0].set_xlabel("time / limit, forward and backward")
    figure.suptitle(f"{op} on {rows[0]['device']}, {commits(rows)}", fontsize=10)
    _save(figure, path)


def _providers(panel: Panel) -> list[str]:
    return list(dict.fromkeys(name for values in panel.values() for name in values))


def _dress(axis: Any, title: str, panel: Panel, unit: str, log: bool, legend: bool) -> None:
    from matplotlib.ticker import LogFormatter

    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        # Numbers between the powers of ten only where there are not two of these.
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
        axis.tick_params(axis="y", which="minor", labelsize=8)
    axis.set_xticks(range(len(panel)), list(panel), fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if legend:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def lines(panels: Mapping[str, Panel], unit: str, title: str, path: Path) -> None:
    """One panel below the other, a line for each provider over the categories; the scale is logarithmic."""
    figure, axes = _figure(len(panels), 3.6)
    for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
        colour = colours(_providers(panel))
        for provider, marker in zip(_providers(panel), "osv^D<>Pp*Xh" * 4, strict=False):
            points = [(i, values[provider]) for i, values in enumerate(panel.values()) if provider in values]
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=5, color=colour[provider], label=provider)
        _dress(axis, name, panel, unit, log=True, legend=True)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def bars(panels: Mapping[str, tuple[str, Panel]], title: str, path: Path, log: bool = False) -> None:
    """One panel below the other, with its unit: bars of the providers side by side in each category."""
    figure, axes = _figure(len(panels), 3.2)
    before: list[str] = []
    for axis, (name, (unit, panel)) in zip(axes[:, 0], panels.items(), strict=True):
        providers = _providers(panel)
        colour, width = colours(providers), 0.84 / len(providers)
        for n, provider in enumerate(providers):
            points = [(i, values[provider]) for i, values in enumerate(panel.values()) if provider in values]
            places = [i + (n - (len(providers) - 1) / 2) * width for i, _ in points]
            drawn = axis.bar(places, [value for _, value in points], width, color=colour[provider], label=provider)
            # More than these cannot be read; the numbers are in the tables too.
            if len(providers) * len(panel) <= 30:
                upright = 90 if len(providers) * len(panel) > 16 else 0
                axis.bar_label(drawn, [_plain(value) for _, value in points], padding=2, fontsize=7, rotation=upright)
        axis.margins(x=0.02, y=0.2)
        _dress(axis, name, panel, unit, log, legend=providers != before)
        before = providers
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _class_label(row: Row) -> str:
    part = ", part" * bool(row.get("scale"))
    return f"C={row['dims']['C']:,}\n{row['workload']}{part}\nB={row['dims']['B']}"


def class_rows(rows: list[Row]) -> list[Row]:
    """The rows of one op in one dtype that differ in classes, images, groups and heads only, the fewest classes first.

    Of several such sets the one with the most numbers of classes; none where no set has two.
    """
    sets: dict[str, list[Row]] = {}
    for row in rows:
        if "C" in row["dims"]:
            sizes = {name: value for name, value in row["dims"].items() if name not in FREE_SIZES}
            sets.setdefault(json.dumps(sizes, sort_keys=True), []).append(row)
    best = max(sets.values(), key=lambda mine: len({row["dims"]["C"] for row in mine}), default=[])
    if len({row["dims"]["C"] for row in best}) < 2:
        return []
    return sorted(best, key=lambda row: (row["dims"]["C"], row["dims"]["B"], row["title"]))


def class_panel(rows: list[Row], entry: str, per_image: bool) -> dict[str, dict[str, float]]:
    """One op's values by number of classes and provider."""
    panel: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get(entry) is not None:
            value = row[entry] / row["dims"]["B"] if per_image else row[entry]
            panel.setdefault(_class_label(row), {})[row["provider"]] = value
    return panel


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
