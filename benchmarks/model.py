"""A cost model of the Triton kernels: ranks launch configurations without a GPU, and is held against measured rows.

    python -m benchmarks.model --op group_fc --target sm_90        the ranked configurations of each workload and pass
    python -m benchmarks.model --eager --op csra_pool              plain PyTorch by the same arithmetic beside it
    python -m benchmarks.model --against benchmarks/results/*/*.jsonl

Times are modelled: published peaks of the device, assumed latencies and shares (devices.py), counts of bytes and
operations from the kernels (cost/products.py). They are there to choose what is worth measuring, by benchmarks.tune.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from mlhead.testing import CASES

from .cost import eager
from .cost.devices import ASSUMED, DEVICES, H200_BANDWIDTH, Device, total
from .cost.launches import passes
from .cost.products import Problem
from .cost.sites import OPS, SITES, Config, Picker, Site, fits, space
from .plan import parse_dims
from .records import Row, read_rows

PASSES = ("forward", "backward", "both")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PROVIDER = "mlhead: triton"


@dataclass(frozen=True)
class Ranked:
    """One configuration of a site in one pass.

    Args:
        config: The configuration.
        seconds: Modelled time of the pass with it.
        shipped: Whether it is the shipped one.
    """

    config: Config
    seconds: float
    shipped: bool


@dataclass(frozen=True)
class Ranking:
    """The configurations of one site in one pass of one workload.

    Args:
        site: The configuration function.
        workload: Name of the workload.
        key: The pass.
        called: All arguments that the op calls the function with; a candidate stands for the answers to all of them.
        configs: The configurations, the fastest first.
    """

    site: Site
    workload: str
    key: str
    called: tuple[tuple[Any, ...], ...]
    configs: tuple[Ranked, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the first call, for which candidates are made."""
        return self.called[0]

    @property
    def shipped(self) -> Ranked:
        """The shipped one."""
        return next(ranked for ranked in self.configs if ranked.shipped)

    @property
    def rank(self) -> int:
        """The place of the shipped one, from 1 on."""
        return self.configs.index(self.shipped) + 1

    @property
    def gain(self) -> float:
        """How much less the best takes than the shipped one, modelled, as a share of the pass."""
        return 1.0 - self.configs[0].seconds / self.shipped.seconds


def short(config: Config) -> str:
    """A configuration in a few letters: "B128 E64 J64 warps8 stages3"."""
    values = asdict(config).items()
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')}{value}" for name, value in values)


def ranked_passes(op: str) -> tuple[str, ...]:
    """The passes in which configurations are ranked and measured: a loss in the head does its work in both at once."""
    return ("forward", "both") if op.endswith("_loss") else ("forward", "backward")


def rankings(op: str, workload: str, p: Problem) -> list[Ranking]:
    """For each pass and each site that it launches by: all configurations that fit."""
    picker = Picker()
    shipped_passes = passes(op, p, picker)
    found = []
    for site in (s for s in SITES if s.op == op and s.title in picker.called):
        called = tuple(picker.called[site.title])
        arguments = called[0]
        own = site.function()(*arguments)
        keys = [k for k in ranked_passes(op) if any(work.site == site.name for work in shipped_passes[k])]
        times: dict[str, list[Ranked]] = {key: [] for key in keys}
        for config in space(site, arguments):
            shipped = config == own
            works = shipped_passes if shipped else passes(op, p, Picker({site.title: config}))
            for key in keys:
                # What is shipped compiles and fits, whatever the assumed registers say.
                if shipped or fits(works[key], site, p.device):
                    times[key].append(Ranked(config, total(works[key], p.device), shipped))
        for key in keys:
            # Of equal ones the shipped one is first.
            ordered = tuple(sorted(times[key], key=lambda ranked: (ranked.seconds, not ranked.shipped)))
            found.append(Ranking(site, workload, key, called, ordered))
    return found


def limit(op: str, key: str, p: Problem) -> float:
    """Seconds that the published peaks allow the op."""
    case = CASES[op]
    flops, size = case.flops(p.dims), case.bytes(p.dims, p.element_bytes)
    rate = p.device.tensor if p.element_bytes == 2 else p.device.tf32 if p.tf32 else p.device.lanes
    if not any("product" in work.kernel or work.matrix for work in passes(op, p)["forward"]):
        rate = p.device.lanes
    keys = ("forward", "backward") if key == "both" else (key,)
    return max(sum(flops[k] for k in keys) / rate, sum(size[k] for k in keys) / p.device.bandwidth)


def microseconds(value: float) -> str:
    """Seconds as microseconds for people."""
    return f"{value * 1e6:.1f} us" if value < math.inf else "does not fit"


def print_rankings(op: str, workload: str, p: Problem, top: int) -> None:
    """One block for each site and pass."""
    for ranking in rankings(op, workload, p):
        shipped = ranking.shipped
        print(
            f"{ranking.site.title} {workload} {ranking.key}: the shipped one is {ranking.rank} of "
            f"{len(ranking.configs)}, the best would take {ranking.gain:.0%} less; modelled "
            f"{microseconds(shipped.seconds)}, {limit(op, ranking.key, p) / shipped.seconds:.2f} of the published limit"
        )
        shown = list(enumerate(ranking.configs, 1))[:top]
        if shipped not in ranking.configs[:top]:
            shown.append((ranking.rank, shipped))
        for place, ranked in shown:
            mark = "  shipped" if ranked.shipped else ""
            print(f"  {place:>4}  {microseconds(ranked.seconds):>11}  {short(ranked.config)}{mark}")


def beside_eager(op: str, workload: str, p: Problem) -> list[str]:
    """A line for each pass: modelled time of the op, and of plain PyTorch with its kernels, as multiples of it."""
    own, lines = passes(op, p), []
    others = {name: eager.eager(op, name, p) for name in eager.plain(op)}
    if op == "csra_pool":
        others["least with a map"] = eager.least_with_a_map(p)
    for key in ("forward", "both"):
        mine = total(own[key], p.device)
        cells = [
            f"{name} {microseconds(found)} ({len(works[key])} kernels) {found / mine:.2f}x"
            for name, works in others.items()
            for found in (total(works[key], p.device),)
        ]
        share = limit(op, key, p) / mine
        lines.append(
            f"{workload} {key}: mlhead {microseconds(mine)}, {share:.2f} of the published limit; " + "; ".join(cells)
        )
    return lines


def device_of(row: Mapping[str, Any]) -> Device | None:
    """The device that a row was measured on, None where the model has none."""
    device = DEVICES.get(row.get("capability", ""))
    if device is None:
        return None
    if "H200" in row["device"]:
        device = replace(device, name="H200", bandwidth=H200_BANDWIDTH)
    return replace(device, multiprocessors=row.get("multiprocessors") or device.multiprocessors)


def modelled_row(row: Row) -> float | None:
    """Modelled seconds of a measured row of an op's Triton backend, None for what is none or has no model."""
    if row.get("provider") != PROVIDER or row.get("op") not in OPS or row.get("p50_ms") is None:
        return None
    device = device_of(row)
    if device is None or row["dtype"] not in ELEMENT_BYTES:
        return None
    p = Problem(row["dims"], ELEMENT_BYTES[row["dtype"]], device)
    return total(passes(row["op"], p)[row["pass"]], device)


def ranks(values: list[float]) -> list[float]:
    """The places of the values from 1 on, the mean place for equal ones."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: the correlation of the places; NaN for fewer than two values, or where one side is all equal."""
    if len(a) < 2:
        return math.nan
    x, y = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    above = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    below = math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))
    return above / below if below else math.nan


def _configurations(rows: list[Row]) -> list[str]:
    """Where benchmarks.tune measured several configurations of a site: does the model order them as they are?"""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("kind") == "tune" and row.get("p50_ms") is not None and row.get("modelled_ms"):
            groups.setdefault(f"{row['device']}: {row['title']}", []).append(row)
    lines = []
    for title, group in groups.items():
        found = rank_correlation([row["modelled_ms"] for row in group], [row["p50_ms"] for row in group])
        lines.append(f"  {title}: {len(group)} configurations, rank correlation {found:.2f}")
    return ["Configurations measured by benchmarks.tune:", *lines] if lines else []


def against(rows: list[Row], misses: int = 10) -> str:
    """The measured over the modelled time of each row, rank correlation of all and of each op, the largest misses."""
    held = [(row, row["p50_ms"] * 1e-3, found) for row in rows if (found := modelled_row(row)) is not None]
    tuned = _configurations(rows)
    if not held:
        without = f"There are no rows of {PROVIDER} on a device that the model knows ({', '.join(DEVICES)})"
        return "\n".join([f"{without}: nothing to hold it against.", *tuned])
    lines = ["measured  modelled  ratio  row"]
    names = {id(row): f"{row['op']} {row['workload']} {row['dtype']} {row['pass']} on {row['device']}" for row in rows
             if "op" in row}  # fmt: skip
    for row, measured, modelled in held:
        ratio = measured / modelled
        lines.append(f"{microseconds(measured)}  {microseconds(modelled)}  {ratio:.2f}  {names[id(row)]}")
    lines.append("")
    for op in dict.fromkeys([*(row["op"] for row, _, _ in held), ""]):
        mine = [(measured, modelled) for row, measured, modelled in held if op in ("", row["op"])]
        ratios = [measured / modelled for measured, modelled in mine]
        correlation = rank_correlation([m for m, _ in mine], [m for _, m in mine])
        lines.append(
            f"{op or 'all'}: {len(mine)} rows, rank correlation {correlation:.2f}, measured / modelled median "
            f"{median(ratios):.2f}, geometric mean {geometric_mean(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    lines += ["", "The largest misses:"]
    for row, measured, modelled in sorted(held, key=lambda h: -abs(math.log(h[1] / h[2])))[:misses]:
        lines.append(f"  {measured / modelled:.2f}  {names[id(row)]}")
    return "\n".join([*lines, *([""] if tuned else []), *tuned])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--op", action="append", choices=OPS, help="default: all")
    add("--workload", action="append", help="default: all")
    add("--target", action="append", choices=DEVICES, help="default: sm_90")
    add("--dtype", choices=ELEMENT_BYTES, default="bf16")
    add("--tf32", action="store_true", help="fp32 products in TF32")
    add("--top", type=int, default=5, help="configurations to print")
    add("--dims", type=parse_dims, help="one workload of your own, e.g. B=64,G=100,E=768,C=9605; needs --op")
    add("--eager", action="store_true", help=f"beside plain PyTorch: {', '.join(eager.INPUTS)}")
    add("--against", type=Path, nargs="+", metavar="FILE", help="results files with measured rows")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    cli = parser()
    options = cli.parse_args(arguments)
    if options.against:
        print(against([row for path in options.against for row in read_rows(path)]))
        return 0
    if options.dims and not options.op:
        cli.error("--dims needs --op")
    some = False
    for target in options.target or ["sm_90"]:
        device = DEVICES[target]
        print(f"{device.name}, {options.dtype}: modelled from published peaks and assumed shares {ASSUMED}\n")
        for op in options.op or OPS:
            for name, dims in ({"custom": options.dims} if options.dims else CASES[op].workloads).items():
                if options.workload and name not in options.workload:
                    continue
                p = Problem(dims, ELEMENT_BYTES[options.dtype], device, options.tf32)
                if not options.eager:
                    print_rankings(op, name, p, options.top)
                elif op in eager.INPUTS:
                    print("\n".join(f"{op} {line}" for line in beside_eager(op, name, p)))
                some = some or not options.eager or op in eager.INPUTS
    if not some:
        cli.error("no workload is left by the filters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
