"""Rows as text: one table for each group, and where plain PyTorch wins."""

from __future__ import annotations

from .records import Row

PASSES = ("forward", "backward", "both")


def _time(value: float) -> str:
    return f"{value * 1e3:.1f} us" if value < 1 else f"{value:.2f} ms"


def _columns(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def by_group(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each group, in the order of measurement."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["title"], []).append(row)
    return found


def _cells(rows: list[Row]) -> tuple[str, ...]:
    done = {row["pass"]: row for row in rows if row["status"] == "ok" and row["p50_ms"] is not None}
    times = [_time(done[name]["p50_ms"]) if name in done else "-" for name in PASSES]
    both = done.get("both") or done.get("forward")
    if both is None:
        return (*times, "-", "-", "-", "-", "-")
    worst = max(both["errors"].values(), key=lambda e: e["error"] / (e["budget"] or 1.0), default=None)
    error = f"{worst['error']:.1e}/{worst['budget']:.1e}" if worst else "-"
    peak = "-" if both["peak_mib"] is None else f"{both['peak_mib']:.0f}"
    return (*times, f"{both['fraction']:.2f}", f"{both['gbps']:.1f}", f"{both['tflops']:.3f}", peak, error)


def table(rows: list[Row]) -> str:
    """One table for each group; times are medians, the other columns belong to the forward and backward together."""
    text = []
    for title, group in by_group(rows).items():
        head = ("", *PASSES, "of limit", "GB/s", "TFLOP/s", "peak MiB", "error/budget")
        lines: list[tuple[str, ...]] = [head]
        notes = []
        for name in dict.fromkeys(row["provider"] for row in group):
            mine = [row for row in group if row["provider"] == name]
            lines.append((name, *_cells(mine)))
            notes += sorted({f"  {name}: {row['status']}: {row['message']}" for row in mine if row["status"] != "ok"})
        limits = {row["pass"]: row for row in group}
        stated = ", ".join(f"{p} {_time(r['limit_ms'])} ({r['limit_by']})" for p, r in limits.items())
        text += [title, f"  limits here: {stated}", *("  " + line for line in _columns(lines)), *notes, ""]
    return "\n".join(text)


def verdicts(rows: list[Row]) -> str:
    """For each group and pass: mlhead's default against the papers' formulation and the best plain PyTorch."""
    lines, losses = [], []
    for title, group in by_group(rows).items():
        for name in PASSES:
            timed = [row for row in group if row["pass"] == name and row["p50_ms"] is not None]
            ours = next((row for row in timed if row["auto"]), None)
            others = {row["provider"]: row["p50_ms"] for row in timed if row["kind"] == "baseline"}
            if ours is None or not others:
                continue
            best = min(others, key=others.__getitem__)
            factors = [f"{others[best] / ours['p50_ms']:.2f}x {best}"]
            factors += [
                f"{t / ours['p50_ms']:.1f}x {n}" for n, t in others.items() if n.startswith("papers") and n != best
            ]
            lines.append(f"  {title.split('  ')[0]}, {name}: {ours['provider']} is " + ", ".join(factors))
            if others[best] < ours["p50_ms"]:
                losses.append(f"  {title.split('  ')[0]}, {name}: {best} by {ours['p50_ms'] / others[best]:.2f}x")
    return "\n".join(
        [
            "Speed of mlhead's own choice over the best plain PyTorch and the papers' formulation:",
            *(lines or ["  nothing was timed"]),
            "",
            "Where plain PyTorch wins:" if losses else "Plain PyTorch wins nowhere.",
            *losses,
        ]
    )
