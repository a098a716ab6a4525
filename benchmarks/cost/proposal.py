"""What benchmarks.tune proposes: rows for the configuration functions of kernels/, as a diff that is applied by hand.

A row is an early answer for one shape, dtype and architecture, with the evidence above it:

    # NVIDIA H100 80GB HBM3, torch 2.11.0, Triton 3.6.0, commit 0123456789ab: group_fc openimages forward (B=128
    # ...) in bf16 20.1 us (20.0 to 20.3) where Tile(...) took 22.4 us (22.2 to 22.7), 10 % less.
    if (B, E, J, element_bytes, vector, device.capability) == (128, 768, 97, 2, False, 90):
        return Tile(128, 64, 32, 8, 4)
"""

from __future__ import annotations

import ast
import difflib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from mlhead.kernels._device import H100

from ..machine import ROOT
from ..records import Row
from .sites import BY_TITLE, Config, Site


@dataclass(frozen=True)
class Proposal:
    """One new row.

    Args:
        site: The configuration function.
        names: What it is asked about: its parameters, of the device the architecture.
        values: For which values it shall answer.
        config: What it shall answer.
        evidence: Sentences for the comment.
    """

    site: Site
    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    config: Config
    evidence: tuple[str, ...]

    def lines(self) -> list[str]:
        """The source lines of the row."""
        wrapped = [line for text in self.evidence for line in textwrap.wrap(text, 113)]
        asked = f"({', '.join(self.names)})"
        written = [repr(value).replace("'", '"') for value in self.values]
        if len(written) == 1:
            condition = [f"    if {asked} == {written[0]}:"]
        else:  # a line for each
            condition = [f"    if {asked} in (", *(f"        {value}," for value in written), "    ):"]
        answer = f"{type(self.config).__name__}({', '.join(str(value) for value in astuple(self.config))})"
        return [*(f"    # {line}" for line in wrapped), *condition, f"        return {answer}"]


def key_of(site: Site, arguments: Sequence[Any]) -> tuple[tuple[str, Any], ...]:
    """The conditions under which a function gets these arguments; of a device it is the architecture."""
    pairs = zip(site.parameters(), arguments, strict=True)
    return tuple(
        (f"{name}.capability", value.capability) if name == "device" else (name, value) for name, value in pairs
    )


def faster(row: Row, shipped: Row) -> bool:
    """Whether a configuration is faster by more than the noise: its p80 is below the shipped one's p20."""
    return bool(row["p80_ms"] < shipped["p20_ms"])


def slower(row: Row, shipped: Row) -> bool:
    """Whether it is slower by more than the noise."""
    return bool(row["p20_ms"] > shipped["p80_ms"])


def _microseconds(row: Row) -> str:
    return f"{1e3 * row['p50_ms']:.1f} us ({1e3 * row['p20_ms']:.1f} to {1e3 * row['p80_ms']:.1f})"


def _evidence(row: Row, shipped: Row) -> str:
    versions, dirty = row["versions"], " (dirty)" if row["dirty"] else ""
    dims = " ".join(f"{letter}={value}" for letter, value in row["dims"].items())
    change = 1.0 - row["p50_ms"] / shipped["p50_ms"]
    return (
        f"{row['device']}, torch {versions['torch']}, Triton {versions['triton']}, commit {row['commit']}"
        f"{dirty}: {row['case']} {row['workload']} {row['pass']} ({dims}) in {row['dtype']} "
        f"{_microseconds(row)} where {shipped['written']} took {_microseconds(shipped)}, "
        f"{abs(change):.0%} {'less' if change >= 0 else 'more'}."
    )


def proposals(rows: list[Row]) -> list[Proposal]:
    """At most one row for each key of each site, from rows of kind "tune" that were measured together.

    A key may stand for several ops, passes and workloads, which the function cannot tell apart: then a configuration
    must have been measured in all of them, be faster by more than the noise in one and slower by more than it in none.
    Of several the largest gain is taken, by the geometric mean.
    """
    groups: dict[tuple[str, str], dict[tuple[str, ...], list[Row]]] = {}
    for row in rows:
        if row.get("kind") == "tune" and row["status"] == "ok" and row["p50_ms"] is not None:
            place = (row["case"], row["workload"], row["pass"], row["dtype"])
            groups.setdefault((row["site"], repr(row["key"])), {}).setdefault(place, []).append(row)
    found = []
    for (title, _), places in groups.items():
        best: tuple[float, list[tuple[Row, Row]]] | None = None
        shipped_rows = {place: [row for row in mine if row["shipped"]] for place, mine in places.items()}
        if not all(shipped_rows.values()):
            continue
        for written in {row["written"]: None for mine in places.values() for row in mine if not row["shipped"]}:
            same = {place: [row for row in mine if row["written"] == written] for place, mine in places.items()}
            if not all(same.values()):
                continue
            pairs = [(same[place][-1], shipped_rows[place][-1]) for place in places]
            if not any(faster(*pair) for pair in pairs) or any(slower(*pair) for pair in pairs):
                continue
            gain = -math.fsum(math.log(row["p50_ms"] / shipped["p50_ms"]) for row, shipped in pairs) / len(pairs)
            if best is None or gain > best[0]:
                best = gain, pairs
        if best is not None:
            site, row = BY_TITLE[title], best[1][0][0]
            names, values = row["key"]["names"], tuple(tuple(value) for value in row["key"]["values"])
            evidence = [_evidence(row, shipped) for row, shipped in best[1]]
            if "device.capability" not in names:
                evidence.append("The function does not know the device: this row holds on all of them.")
            made = site.function()(
                *(H100 if n == "device.capability" else v for n, v in zip(names, values[0], strict=True))
            )
            config = type(made)(**row["config"])
            found.append(Proposal(site, tuple(names), values, config, tuple(evidence)))
    return found


def insert(source: str, proposed: list[Proposal]) -> str:
    """The source with every row at the beginning of its function, behind the docstring."""
    lines = source.splitlines()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for proposal in sorted(proposed, key=lambda p: -functions[p.site.name].lineno):
        body = functions[proposal.site.name].body
        documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        at = (body[0].end_lineno or 0) if documented else body[0].lineno - 1
        lines[at:at] = proposal.lines()
    return "\n".join(lines) + "\n"


def diff(proposed: list[Proposal], root: Path = ROOT) -> str:
    """A unified diff of kernels/ for `git apply` or `patch -p1`; empty where nothing is proposed."""
    text: list[str] = []
    for module in dict.fromkeys(proposal.site.module for proposal in proposed):
        name = f"kernels/{module}.py"
        old = (root / name).read_text()
        new = insert(old, [proposal for proposal in proposed if proposal.site.module == module])
        text += difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(text)
