"""A cycle model of Triton kernels from their machine code: what an H100 would do, counted without one. No measurement.

    python -m benchmarks.cycles                                        csra_pool's fused forward and group_fc's
    python -m benchmarks.cycles --workload coco --tile 128,64,64,4,3   beside the shipped configuration another one

A kernel is compiled for sm_90 and disassembled. Its innermost loop with matrix instructions is the main loop; what lies
before it is the prologue, behind it the epilogue. Each is counted in cycles of a multiprocessor, for n instructions of
each of the w warps of a program:

    tensor         N / 2 for m64 n N of a warpgroup, in any dtype: 64 N 16 multiply-adds in 16 bits at 2048 a cycle,
                   published peak / (2 multiprocessors clock); instructions of sm_80 have `older_share` of that rate
    shared memory  128 bytes a cycle: matrices at each use (A 2048 bytes, B 32 N), copies into it, loads and stores,
                   spilled registers; no bank conflicts
    issue          n w / 4
    alu            n w / 2: integers, comparisons, selections, minimum and maximum, 64 lanes a cycle
    special        2 n w: exp2 and its like, conversions, 16 a cycle
    shuffle        n w: 32 a cycle
    L2             bytes, masked ones too, at the multiprocessor's share of CACHE_BYTES
    chain          the stall counts that ptxas wrote for one warp, and BARRIER for each barrier: what a warp takes that
                   has the machine to itself and never waits for memory or shuffles

Rates of lanes are those of the CUDA programming guide for 9.0. Alone, a step of the loop takes the largest count; no
less than (latency + chain) / d where loads are d steps ahead; tensor + chain if it waits for all its products. Then

    alone = start + latency + largest of the prologue + steps x step + largest of the epilogue

Where r programs share a multiprocessor, the epilogue of one overlaps with the loop of another, and units add up. With k
programs on the busiest multiprocessor, k = ceil(programs / multiprocessors), a launch takes

    r = 1    k alone
    r > 1    the larger of ceil(k / r) alone and k (busiest unit over a whole program) + alone - steps x step

and no less than its bytes of memory. Clock, bandwidth, latencies and shares are those of cost/devices.py, at the clock
of the published peak; a GPU at its limit of power is slower. The rate of L2 is not: the 5.5 TB/s there are less than
the 7.1 of tiles of 128 x 256 x 128 in 8 bits at 1209 TFLOP/s, which https://github.com/triton-lang/triton/pull/5461
reports of an H100 (this model says 1388). No rate is published for it; CACHE_BYTES is what NVIDIA gives for the A100.
Times are without launches and without other kernels. A loop in the epilogue counts once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlhead.kernels import csra_pool_fused
from torch._subclasses.fake_tensor import FakeTensorMode

from mlhead.ops._csra_kernels import forward_design
from mlhead.testing import CASES, aot, sass
from mlhead.testing.offline import compiling

from .cost import products
from .cost.candidates import _only, configured
from .cost.devices import ASSUMED, DEVICES, Resources, Work, occupancy
from .cost.products import Problem
from .cost.sites import SITES, Config, Site, kernel_device
from .model import short

DEVICE = DEVICES["sm_90"]
COSTS = csra_pool_fused.COSTS  # what kernels/ assume
CACHE_BYTES = COSTS.cache_bytes  # a cycle, for all multiprocessors
BARRIER = 30.0  # cycles from the last warp's arrival on; assumed
LIBRARY_RATE = COSTS.flops  # FLOP per second of the vendor's library
WORKLOADS = {
    "csra_pool": ("voc", "coco", "coco-vit", "imagenet", "openimages"),
    "group_fc": ("openimages", "million"),
}
MATRIX = ("HGMMA", "QGMMA", "HMMA")
SPECIAL = ("MUFU", "I2F", "I2FP", "F2I", "F2F", "F2FP")
ALU = (
    "FMNMX", "FSEL", "FSETP", "ISETP", "SEL", "LOP3", "SHF", "IADD3", "LEA", "IABS", "PRMT", "PLOP3", "IMNMX",
    "VIMNMX", "SGXT", "P2R", "R2P",
)  # fmt: skip
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)([^;]*);")
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass
class Instruction:
    """One instruction: its address, opcode and the same without modifiers, operands and stall count."""

    address: int
    opcode: str
    name: str
    operands: str
    stall: int = 0


Units = defaultdict[str, float]  # cycles of each unit for all warps of a program, and "chain"


@dataclass(frozen=True)
class Code:
    """A kernel in its parts; whether a step waits for all its products, and how many steps loads are ahead."""

    prologue: Units
    loop: Units
    epilogue: Units
    waits: bool
    ahead: float


@dataclass(frozen=True)
class Modelled:
    """A launch: programs at once and in all on the busiest multiprocessor, cycles of a step, seconds, what decides."""

    resident: int
    most: int
    step: float
    seconds: float
    bound: str


def instructions(text: str) -> list[Instruction]:
    """What `cuobjdump --dump-sass` printed, up to the last EXIT; stalls are in the second word, on its own line."""
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            found.append(Instruction(int(match[1], 16), match[2], match[2].split(".")[0], match[3].strip()))
        elif found and (match := _CONTROL.match(line)):
            found[-1].stall = int(match[1], 16) >> 41 & 15
    return found[: max((i for i, one in enumerate(found) if one.name == "EXIT"), default=-1) + 1]


def main_loop(code: Sequence[Instruction]) -> slice:
    """The shortest loop that multiplies matrices."""
    places = {one.address: i for i, one in enumerate(code)}
    loops = []
    for end, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.name == "BRA" else None
        begin = places.get(int(target[1], 16), end) if target else end
        if any(inside.name in MATRIX for inside in code[begin:end]):
            loops.append((end - begin, begin, end + 1))
    if not loops:
        raise ValueError("there is no loop with matrix instructions in the code")
    return slice(*min(loops)[1:])


def section(code: Sequence[Instruction], warps: int, cache: float = CACHE_BYTES) -> Units:
    """The counts of a part of a kernel."""
    units: Units = defaultdict(float, issue=len(code) * warps / 4)
    for one in code:
        name = one.name
        units["chain"] += one.stall + (BARRIER if name == "BAR" else 0.0)
        lanes = 32.0 * warps * (16 if ".M88.4" in one.opcode else int(sass._width(one.opcode)))
        if shape := re.match(r"[HQ]GMMA\.64x(\d+)x", one.opcode):
            n = int(shape[1])
            a = 2048 if re.match(r"R\d+, gdesc", one.operands) else 0  # A may be in registers, B never is
            units["tensor"] += n / 2 * warps / 4
            units["shared memory"] += (a + 32 * n) * warps / 4 / 128
        elif name == "HMMA":
            units["tensor"] += warps * (0.5 if ".1688." in one.opcode else 1.0) / ASSUMED.older_share
        elif name in ("UTMALDG", "UBLKCP"):
            raise ValueError(f"{name} does not say how many bytes it copies")
        elif name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL") and "[RZ]" not in one.operands:
            units["shared memory"] += lanes / 128
        units["shuffle"] += warps * (name == "SHFL")
        units["special"] += 2 * warps * (name in SPECIAL)
        units["alu"] += warps / 2 * (name in ALU)
        units["L2"] += lanes * DEVICE.multiprocessors / cache * (name in ("LDGSTS", "LDG", "STG"))
    return units


def read_code(text: str, warps: int, cache: float = CACHE_BYTES) -> Code:
    """The parts of a disassembled kernel whose programs have so many warps."""
    code = instructions(text)
    loop = main_loop(code)
    inside = code[loop]

    def least(opcode: str) -> int | None:
        """The fewest groups, of copies or of products, that a wait in the loop leaves under way."""
        waits = (one.operands.split(",") for one in inside if one.opcode == opcode and "," in one.operands)
        return min((int(wait[1], 16) for wait in waits), default=None)

    copies, groups = least("DEPBAR.LE"), sum(one.name == "LDGDEPBAR" for one in inside)
    return Code(
        section(code[: loop.start], warps, cache),
        section(inside, warps, cache),
        section(code[loop.stop :], warps, cache),
        least("WARPGROUP.DEPBAR.LE") == 0,
        1.0 if copies is None else 1.0 + copies / max(1, groups),
    )


def largest(units: Units) -> str:
    """What takes a program the longest that is alone."""
    return max(units, key=units.__getitem__)


def modelled(code: Code, work: Work) -> Modelled:
    """The time of a launch: programs, steps, warps, resources and bytes of memory as in `work`."""
    resident = occupancy(work.resources, work.warps, DEVICE)
    if resident == 0:
        return Modelled(0, 0, math.inf, math.inf, "does not fit")
    most, loop, steps = math.ceil(work.programs / DEVICE.multiprocessors), code.loop, work.rounds
    takes = {largest(loop): max(loop.values()), "latency": (ASSUMED.latency_cycles + loop["chain"]) / code.ahead}
    if code.waits:
        takes["waiting for products"] = loop["tensor"] + loop["chain"]
    bound = max(takes, key=takes.__getitem__)
    edges = ASSUMED.start_cycles + ASSUMED.latency_cycles + max(code.prologue.values()) + max(code.epilogue.values())
    alone = edges + steps * takes[bound]
    times = {f"{bound}, {edges / alone:.0%} outside the loop": math.ceil(most / resident) * alone}
    if min(resident, most) > 1:
        parts = ((code.prologue, 1.0), (loop, steps), (code.epilogue, 1.0))
        whole = {unit: sum(n * part[unit] for part, n in parts) for unit in loop if unit != "chain"}
        whole["L2"] -= code.prologue["L2"]  # what the prologue copies ahead, the last steps do not
        busiest = max(whole, key=whole.__getitem__)
        times[f"{busiest} of {resident} programs"] = most * whole[busiest] + edges
    times["memory"] = work.dram / (DEVICE.bandwidth * ASSUMED.bandwidth_share) * DEVICE.clock
    decides = max(times, key=times.__getitem__)
    return Modelled(resident, most, takes[bound], times[decides] / DEVICE.clock, decides)


def disassembled(site: Site, workload: str, config: Config) -> tuple[str, Resources]:
    """The machine code of a site's kernel on a workload in bf16, and what a program takes."""
    case = CASES[site.op]
    found: list[tuple[str, Resources]] = []
    variant = aot.Variant(workload, case.workloads[workload], "bf16", all_needs=False)

    def report(function: Any, kernel: Any, arguments: dict[str, Any]) -> None:
        binary = sass.read_binary(kernel)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(kernel.asm["cubin"])
            found.append((sass._tool("--dump-sass", str(path)), Resources(binary.registers, binary.shared)))

    with (
        FakeTensorMode(), compiling("sm_90", report), _only(site.kernels), configured(site, config),
        forward_design("fused"), aot._straight_to_triton(variant),
    ):  # fmt: skip
        next(aot._samples(case, variant)).call()
    return found[0]


def row(site: Site, workload: str, tile: Sequence[int] | None = None, cache: float = CACHE_BYTES) -> list[str]:
    """What the model says of the shipped configuration or of another one."""
    case = CASES[site.op]
    p, device = Problem(case.workloads[workload], 2, DEVICE), kernel_device(DEVICE)
    if site.op == "csra_pool":
        own = site.function()(p["H"] * p["C"], 2, device)
        config = type(own)(*tile) if tile else own
        work = products.csra_fused(p, config)
    else:
        J = math.ceil(p["C"] / p["G"])
        vector = p["E"] % 16 == 0 and J % 16 == 0
        own = site.function()(p["B"], p["E"], J, 2, vector, device)
        config = type(own)(*tile) if tile else own
        work = products.group_fc_forward(p, config, vector)
    text, resources = disassembled(site, workload, config)
    registers = f"{resources.registers}{' spills' * (' LDL' in text)}"
    work = work.given(resources)
    code = read_code(text, work.warps, cache)
    found = modelled(code, work)
    flops, moved = case.flops(p.dims)["forward"], case.bytes(p.dims, 2)["forward"]
    limits = [max(flops / rate, moved / DEVICE.bandwidth) for rate in (LIBRARY_RATE, DEVICE.tensor)]
    return [
        site.op, workload, short(config), registers, f"{found.resident} of {found.most}",
        f"{max(code.prologue.values()):.0f}", f"{work.rounds:.0f} x {found.step:.0f}", f"{code.loop['tensor']:.0f}",
        f"{max(code.epilogue.values()):.0f} {largest(code.epilogue)}",
        "yes" if code.waits else "no", f"{code.ahead:.0f}",
        f"{found.seconds * 1e6:.1f}", *(f"{limit / found.seconds:.2f}" for limit in limits), found.bound,
    ]  # fmt: skip


HEAD = (
    "op", "workload", "configuration", "regs", "resident", "prologue", "steps", "tensor", "epilogue", "waits", "ahead",
    "us", "of library", "of peak", "bound by",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--op", action="append", choices=WORKLOADS, help="default: all")
    add("--workload", action="append", help="default: all")
    add("--tile", action="append", default=[], help="another configuration: the values of its fields, with commas")
    add("--cache", type=float, default=CACHE_BYTES, help="bytes a cycle from L2 (default: %(default)s)")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    cli = parser()
    options = cli.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        cli.error("TRITON_INTERPRET is set: its kernels cannot be compiled")
    lines = [list(HEAD)]
    for op in options.op or WORKLOADS:
        site = next(site for site in SITES if site.op == op and site.name in ("fused_tile", "forward_tile"))
        for workload in WORKLOADS[op]:
            if not options.workload or workload in options.workload:
                tiles = [None, *([int(n) for n in tile.split(",")] for tile in options.tile)]
                lines += [row(site, workload, tile, options.cache) for tile in tiles]
    if len(lines) == 1:
        cli.error("no workload is left by the filters")
    print(f"{DEVICE.name}, bf16, forward: a model from machine code, nothing here is measured. Limits: the products at")
    print(f"{LIBRARY_RATE / 1e12:.0f} TFLOP/s and at the peak, or the bytes at the published bandwidth.\n")
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    for line in lines:
        print("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
