"""Where plain PyTorch wins: everything that both mlhead and others have rows of, and what mlhead loses."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Row
from .end_to_end import label, models, variants
from .overhead import calls, clocked, clocks, name_of
from .rows import grouped, in_order, kind_of, median, provider_rank, run_of, timed, version_of
from .tables import number, table


@dataclass(frozen=True)
class Contest:
    """One quantity of which mlhead and others have a row each.

    Args:
        what: Op or head, workload and dtype.
        quantity: What is compared, with its unit.
        ours: Value and row of each provider of mlhead.
        others: Those of plain PyTorch.
        choice: The provider that mlhead takes by itself; "" where no row says so.
        larger_wins: Whether the larger value is the better.
    """

    what: str
    quantity: str
    ours: dict[str, tuple[float, Row]]
    others: dict[str, tuple[float, Row]]
    choice: str = ""
    larger_wins: bool = False

    def _best(self, values: dict[str, tuple[float, Row]]) -> str:
        sign = -1 if self.larger_wins else 1
        return min(sorted(values, key=provider_rank), key=lambda name: sign * values[name][0])

    def loss(self) -> tuple[str, str] | None:
        """The best of the others and the best of mlhead, where mlhead's best or own choice loses; else None."""
        if not self.ours or not self.others:
            return None
        other, own = self._best(self.others), self._best(self.ours)
        sign = -1 if self.larger_wins else 1
        least = sign * self.others[other][0]
        beaten = [name for name in (own, self.choice) if name in self.ours and sign * self.ours[name][0] > least]
        return (other, own) if beaten else None


def _contest(what: str, quantity: str, values: dict[str, tuple[float, Row]], choice: str = "") -> Contest:
    # One mask of the queries for the whole batch is another computation, and no answer to the others.
    values = {name: value for name, value in values.items() if "shared query dropout" not in name}
    ours = {name for name in values if name.startswith("mlhead") or name.split(": ")[-1].startswith("mlhead")}
    others = {name: value for name, value in values.items() if name not in ours}
    return Contest(what, quantity, {name: values[name] for name in values if name in ours}, others, choice)


def _calls(rows: list[Row]) -> list[Contest]:
    """What a call costs, in the same mode; of the clocks those that a user waits for."""
    found = []
    for group in calls([row for row in rows if kind_of(row) == "overhead"]):
        ready, first = [row for row in group if clocked(row)], group[0]
        what = f"a call of {name_of(first)}, {first['mode']}"
        for clock in clocks(first):
            if clock != "thread":
                times = {row["provider"]: (row[f"{clock}_us"]["p50"], row) for row in ready}
                found.append(_contest(what, f"{first['pass']}, {clock} us", times, "mlhead: auto"))
    return found


def _models(rows: list[Row]) -> list[Contest]:
    """Whole models with a head, end to end."""
    found = []
    for group in models([row for row in rows if kind_of(row) == "end_to_end" and row["head_name"]]):
        mine = {name: row for name, row in variants(group).items() if timed(row)}
        times = {name: (row["p50_ms"], row) for name, row in mine.items()}
        found.append(_contest(label(group[0]), f"{group[0]['pass']}, ms", times, "mlhead"))
        peaks = {name: (row["peak_mib"], row) for name, row in mine.items() if row.get("peak_mib") is not None}
        found.append(_contest(label(group[0]), f"peak MiB of {group[0]['pass']}", peaks, "mlhead"))
    return found


def contests(rows: list[Row]) -> list[Contest]:
    """All that both mlhead and plain PyTorch have rows of, on one device: times, memory, images a second."""
    found = []
    ops = in_order([row for row in rows if kind_of(row) == "op"])
    for (op, _, key), group in grouped(sorted(ops, key=lambda row: row["op"]), "op", "title", "pass").items():
        part = " and ".join(f"{name}/{factor}" for name, factor in (group[0].get("scale") or {}).items())
        what = f"`{op}` {group[0]['workload']}{f' ({part})' if part else ''} {group[0]['dtype']}"
        choice = next((row["provider"] for row in group if row.get("auto")), "")
        times = {row["provider"]: (row["p50_ms"], row) for row in group if timed(row)}
        # A loss in the head has made its gradients in the forward: its backward alone is no contest.
        if not (key == "backward" and op.endswith("_loss")):
            found.append(_contest(what, f"{key}, ms", times, choice))
        peaks = {n: (row["peak_mib"], row) for n, (_, row) in times.items() if row.get("peak_mib") is not None}
        if key == "both":
            found.append(_contest(what, "peak MiB of both", peaks, choice))
    heads = in_order([row for row in rows if kind_of(row) == "head"])
    for (_, workload, dtype, key), group in grouped(heads, "head", "workload", "dtype", "pass").items():
        times = {row["provider"]: (row["p50_ms"], row) for row in group if timed(row)}
        found.append(_contest(f"whole head, {workload} {dtype}", f"{key}, ms", times, "mlhead"))
    found += _models(rows) + _calls(rows)
    memory = [row for row in rows if kind_of(row) == "memory"]
    for (op, _, loss), group in grouped(memory, "memory", "dims", "loss").items():
        what = f"`{op}` C={group[0]['dims']['classes']:,} {loss}"
        peaks = {row["provider"]: (row["peak_mib"], row) for row in group}
        found.append(_contest(what, "peak MiB", peaks))
        steps = {row["provider"]: (median(row["seconds"]), row) for row in group if row["seconds"]}
        found.append(_contest(what, "s a step", steps))
    table = [{**row, "provider": row["head"]} for row in rows if kind_of(row) == "table"]
    for (classes,), group in grouped(sorted(table, key=lambda row: row["classes"]), "classes").items():
        for key in ("training", "inference"):
            speeds = {r["head"]: (r[key], r) for r in group if r["head"].endswith("ml_decoder") and r.get(key)}
            own = {name: value for name, value in speeds.items() if name == "ml_decoder"}
            others = {name: value for name, value in speeds.items() if name not in own}
            what = f"Table 9, {classes:,} classes"
            found.append(Contest(what, f"{key}, images a second", own, others, "ml_decoder", larger_wins=True))
    return found


def losses(contests: list[Contest]) -> list[str]:
    """Where plain PyTorch wins on one device, with both numbers."""
    lines = []
    for contest in contests:
        lost = contest.loss()
        if lost is None:
            continue
        other, own = lost
        (theirs, row), (ours, mine) = contest.others[other], contest.ours[own]
        choice, best = contest.ours.get(contest.choice), ""
        if choice is not None and own != contest.choice:
            best, ours, mine, own = f"{own} {number(ours)}", *choice, contest.choice
        factor = theirs / ours if contest.larger_wins else ours / theirs
        together = (
            f"{version_of(row)}" if run_of(row) == run_of(mine) else f"{version_of(row)}, {version_of(mine)}: two runs"
        )
        lines.append(
            [
                contest.what, contest.quantity, other, f"**{number(theirs)}**", own, number(ours), f"{factor:.2f}",
                best or "-", together,
            ]
        )  # fmt: skip
    compared = sum(bool(contest.ours and contest.others) for contest in contests)
    stated = f"In {len(lines)} of {compared} comparisons."
    if not lines:
        return [stated, ""]
    heads = ["what", "quantity", "plain PyTorch", "it has", "mlhead", "mlhead has", "factor", "mlhead's best", "commit"]
    return [stated, "", *table(heads, lines)]
