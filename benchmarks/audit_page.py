"""The text of docs/static_audit.md from rows of compiled kernels, and how many programs are resident."""

from __future__ import annotations

from collections import Counter

from .cost.devices import DEVICES, MOST_WARPS, Resources, occupancy
from .records import Row

COMMAND = "python -m benchmarks.audit"
TARGETS = tuple(DEVICES)
LAYOUTS = ("transposed", "offset", "expanded")
TENSOR_MEMORY = 512  # columns of a multiprocessor

INTRODUCTION = f"""\
<!-- Written by `{COMMAND}`. Do not edit. -->
# Static audit

What the compilers make of every kernel, without a GPU: nothing here is measured on one. `{COMMAND}` writes
this page; `tests/test_audit.py` fails when it is not of the present sources, or names a problem: stack, shared memory
that does not fit, a missing matrix instruction. `tests/test_aot.py` and, where nvcc is there,
`tests/test_csrc_cuda_build.py` compile the kernels anew and check them themselves.

* Triton kernels are compiled through their launchers on fake tensors: all workloads in bf16, the largest of each op
  also in fp32, a few shapes in fp16 and TF32, and tensors that are transposed, expanded or off by one element. A row is
  one kernel, dtype and configuration; where its forms (strides, optional tensors, gradients asked for) differ, it has
  the most registers, stack and shared memory of any, the lowest occupancy, and ranges of the rest.
* .cu kernels are compiled by nvcc, one row for each instance. Threads are those of the launch bounds, with which every
  launch goes.
* Shared memory is that of a program, without the 1 KB that the system takes of each. On sm_90 and sm_100, 1,024 at a
  Triton kernel stands for any amount up to it.
* Occupancy is resident warps out of {MOST_WARPS}, the most that a multiprocessor holds, by registers, shared memory and
  programs; on sm_100 programs that would wait for tensor memory ({TENSOR_MEMORY} columns) do not count.
* Matrix instructions are counted in the code, not as executed; FFMA stands where products are in full fp32. HMMA is
  the instruction of sm_80, which the .cu kernels use everywhere, and Triton on later devices for some small tiles.
* Loads: the widest global load of a thread, and the share of the bytes of all load instructions that comes in 16 bytes
  or more. "bulk" is by the copy engine.
"""


def resident(row: Row) -> int:
    """Programs that a multiprocessor of the row's target holds at once, 0 where one does not fit."""
    held = occupancy(Resources(row["registers"], row["shared"]), row["warps"], DEVICES[row["target"]])
    return min(held, TENSOR_MEMORY // row["tensor_memory"]) if row.get("tensor_memory") else held


def _tensor(names: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in names.items() if not name.startswith("FFMA")}


def share_of_16(loads: dict[str, int]) -> float | None:
    """The share of the bytes of loads, those of the copy engine apart, in 16 bytes or more; None without a load."""
    widths = {int(width): count for width, count in loads.items() if width.isdigit()}
    total = sum(width * count for width, count in widths.items())
    return sum(width * count for width, count in widths.items() if width >= 16) / total if total else None


def configuration(row: Row) -> str:
    """The part of a launch's constants that its configuration sets, in short."""
    chosen = {n: v for n, v in row["config"].items() if n.startswith("BLOCK_") or n in ("D0", "D1", "DEPTH", "LOSS")}
    return " ".join(v if isinstance(v, str) else f"{n.removeprefix('BLOCK_')}={v}" for n, v in chosen.items())


def place(at: str) -> str:
    """The workload of a variant's name."""
    name, _, layout = at.rpartition(" ")
    return "other shapes" if "=" in at else name if layout in LAYOUTS else at


def fold(rows: list[Row]) -> list[list[Row]]:
    """The rows of one line each: equal kernel, dtype, configuration and target."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["target"], row["kernel"], row["dtype"], configuration(row), f"{row['warps']}x{row['stages']}")
        found.setdefault(key, []).append(row)
    return list(found.values())


def _range(values: list[float], unit: str = "") -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return (low if low == high else f"{low} to {high}") + unit


def _matrix(rows: list[Row], products: set[str]) -> str:
    names: Counter[str] = Counter()
    for row in rows:
        names.update(dict.fromkeys(row["matrix"], 1))
    plain = rows[0]["kernel"] in products and rows[0]["dtype"] == "fp32"
    shown = sorted(_tensor(names)) or (sorted(names) if plain else [])
    return ", ".join(f"{name} {_range([r['matrix'].get(name, 0) for r in rows])}" for name in shown) or "-"


def _loads(rows: list[Row]) -> str:
    widths = {width for row in rows for width in row["loads"]}
    shares = [100 * share for row in rows if (share := share_of_16(row["loads"])) is not None]
    widest = max((int(width) for width in widths if width.isdigit()), default=0)
    found = [f"{widest} B", _range(shares, " %")] if shares else []
    return ", ".join(found + ["bulk"] * ("bulk" in widths)) or "-"


def _resources(rows: list[Row]) -> tuple[str, ...]:
    stack = max(max(row["stack"], row["local"]) for row in rows)
    warps = min(resident(row) * row["warps"] for row in rows)
    return (
        str(max(row["registers"] for row in rows)), str(stack), f"{max(row['shared'] for row in rows):,}",
        f"{warps}/{MOST_WARPS}",
    )  # fmt: skip


def product_kernels(rows: list[Row]) -> set[str]:
    """The kernels that multiply matrices: in some dtype by an instruction for it."""
    return {row["kernel"] for row in rows if _tensor(row["matrix"])}


def _markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines)]


def triton_table(rows: list[Row], target: str) -> list[str]:
    """One line for each kernel, dtype and configuration of a target."""
    products, memory = product_kernels(rows), target == "sm_100"
    head = ("kernel", "dtype", "configuration", "warps x stages", "registers", "stack", "shared", "occupancy")
    lines = []
    for group in fold([row for row in rows if row["target"] == target]):
        row = group[0]
        places = ", ".join(dict.fromkeys(place(at) for r in group for at in r["at"]))
        columns = (str(max(r["tensor_memory"] for r in group)),) if memory else ()
        what = (f"`{row['kernel']}`", row["dtype"], configuration(row), f"{row['warps']} x {row['stages']}")
        lines.append((*what, *_resources(group), *columns, _matrix(group, products), _loads(group), places))
    return _markdown((*head, *("tensor memory",) * memory, "matrix", "loads", "at"), lines)


def cuda_table(rows: list[Row], target: str) -> list[str]:
    """One line for each instance of a .cu kernel of a target."""
    products = product_kernels(rows)
    head = ("source", "kernel", "dtype", "instance", "threads", "registers", "stack", "shared", "occupancy")
    lines = [
        (r["op"], f"`{r['kernel']}`", r["dtype"], r["instance"], str(32 * r["warps"]), *_resources([r]),
         _matrix([r], products), _loads([r]))
        for r in rows if r["target"] == target
    ]  # fmt: skip
    return _markdown((*head, "matrix", "loads"), lines)


def summary(rows: list[Row], kind: str) -> list[str]:
    """One line for each kernel: on each target the most registers, stack and shared memory, and the occupancies."""
    kernels = {}
    for row in rows:
        kernels.setdefault((row["op"], row["kernel"]), []).append(row)
    lines = []
    for (op, kernel), mine in kernels.items():
        on = {target: [row for row in mine if row["target"] == target] for target in TARGETS}
        cells: list[tuple[str, ...]] = []
        for found in on.values():
            names = ", ".join(sorted(set().union(*(_tensor(row["matrix"]) for row in found)))) or "-"
            warps = _range([resident(row) * row["warps"] for row in found]) if found else "-"
            cells.append((*_resources(found)[:3], warps, names) if found else ("-",) * 5)
        lines.append((op, f"`{kernel}`", str(len(mine)), *(" / ".join(cell) for cell in zip(*cells, strict=True))))
    head = ("op", kind, "compilations", "registers", "stack", "shared", "resident warps", "matrix")
    return _markdown(head, sorted(lines, key=lambda line: line[:2]))


def problems(triton: list[Row], cuda: list[Row]) -> list[str]:
    """What is wrong with the rows, one line each."""
    found = []
    for row in (*triton, *cuda):
        lines = list(row["problems"])
        if resident(row) == 0:
            lines.append("not one program fits a multiprocessor")
        where = row["instance"] if "instance" in row else row["at"][0]
        found += [f"{row['kernel']} {row['target']} {row['dtype']} {where}: {line}" for line in lines]
    return found


def page(triton: list[Row], cuda: list[Row], versions: dict[str, str], hashes: dict[str, str]) -> str:
    """The page that these rows give."""
    wrong = problems(triton, cuda)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = [
        INTRODUCTION, f"By {made}.", "",
        f"{len(triton)} compilations of Triton kernels and {len(cuda)} of .cu kernels, {len(wrong)} with a problem.",
        "", *(f"* {line}" for line in wrong), *[""] * bool(wrong), "## In short", "",
        f"On {' / '.join(TARGETS)}: the most registers, bytes of stack and of shared memory of any compilation.", "",
        *summary(triton, "Triton kernel"), "", *summary(cuda, ".cu kernel"), "",
    ]  # fmt: skip
    for target in TARGETS:
        name = f"{target} ({DEVICES[target].name})"
        for kind, lines in (("Triton", triton_table(triton, target)), (".cu", cuda_table(cuda, target))):
            text += [f"## {kind} kernels on {name}", "", f"<details><summary>{len(lines) - 2} rows</summary>", ""]
            text += [*lines, "", "</details>", ""]
    text += ["## Sources", "", "The start of each SHA-256, without lines that are blank or of comment only.", ""]
    text += _markdown(("source", "SHA-256"), [(f"`{name}`", f"`{value}`") for name, value in hashes.items()])
    return "\n".join(text) + "\n"
