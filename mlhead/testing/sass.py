"""What is in a compiled Triton kernel: resources and instructions, by the disassembler that Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_DOT = re.compile(r"tt\.dot [^\n]*?: tensor<(\d+)x(\d+)x(\w+)> \* tensor<(\d+)x(\d+)x\w+>")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_MATRIX = re.compile(r"[HDIQ]MMA|[HIQ]GMMA|UTC[A-Z]*MMA")


@dataclass(frozen=True)
class Dot:
    """One tl.dot: M x K times K x N of a dtype, and whether it may use tensor cores."""

    m: int
    n: int
    k: int
    dtype: str
    tf32: bool


@dataclass(frozen=True)
class Binary:
    """Resources and instruction counts of one kernel.

    Args:
        registers: Registers of a thread.
        stack: Bytes of stack of a thread; not 0 where registers spill.
        local: Bytes of local memory of a thread.
        shared: Bytes of shared memory of a program.
        spills: Loads and stores of local memory.
        matrix: Matrix instructions, and FFMA, by name.
        loads: Global loads, those to shared memory included, by bytes of a thread's access; "bulk" by the copy engine.
        stores: The same for global stores.
        dots: The matrix products that the source asks for.
        warps: Warps of a program.
    """

    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    matrix: dict[str, int]
    loads: dict[str, int]
    stores: dict[str, int]
    dots: tuple[Dot, ...]
    warps: int

    def as_row(self) -> dict[str, Any]:
        """What is worth keeping of it."""
        keys = ("registers", "stack", "local", "shared", "spills", "matrix", "loads", "stores")
        return {key: getattr(self, key) for key in keys}

    def expected_matrix_instruction(self, capability: int) -> tuple[str, ...]:
        """The instructions of which at least one must be there, for the matrix products of the source."""
        if not self.dots:
            return ()
        narrow = [dot for dot in self.dots if dot.dtype in ("f16", "bf16")]
        if not narrow:
            return ("HMMA", "HGMMA", "UTCHMMA") if all(dot.tf32 for dot in self.dots) else ("FFMA", "FFMA2")
        # A warpgroup of Hopper works on 64 rows; a smaller tile goes to the older instruction.
        if capability == 90:
            large = any(dot.m >= 64 for dot in narrow) and self.warps % 4 == 0
            return ("HGMMA",) if large else ("HMMA",)
        return ("UTCHMMA", "HMMA") if capability >= 100 else ("HMMA",)

    def matrix_loads(self) -> int:
        """Bytes of global loads in a thread's instructions."""
        return sum(int(width) * count for width, count in self.loads.items() if width.isdigit())

    def narrow_share(self) -> float:
        """The part of those bytes that comes in accesses of less than 16 bytes."""
        narrow = sum(int(width) * count for width, count in self.loads.items() if width.isdigit() and int(width) < 16)
        return narrow / self.matrix_loads()


def _width(opcode: str) -> str:
    return str(next((_WIDTHS[part] for part in opcode.split(".") if part in _WIDTHS), 4))


def _tool(*arguments: str) -> str:
    from triton import knobs

    return subprocess.run(
        [knobs.nvidia.cuobjdump.path, *arguments], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def read_binary(kernel: Any) -> Binary:
    """Disassembles one compiled Triton kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = _USAGE.search(_tool("--dump-resource-usage", str(path)))
        opcodes = Counter(_INSTRUCTION.findall(_tool("--dump-sass", str(path))))
    if usage is None or not opcodes:
        raise RuntimeError(f"cuobjdump said nothing about {kernel.metadata.name}")
    registers, stack, static, local = map(int, usage.groups())
    matrix: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    stores: Counter[str] = Counter()
    spills = 0
    for opcode, count in opcodes.items():
        name = opcode.split(".")[0]
        if _MATRIX.fullmatch(name) or name in ("FFMA", "FFMA2"):
            matrix[name] += count
        elif name in ("LDG", "LDGSTS"):
            loads[_width(opcode)] += count
        elif name in ("UBLKCP", "UTMALDG"):
            loads["bulk"] += count
        elif name == "STG":
            stores[_width(opcode)] += count
        elif name in ("LDL", "STL"):
            spills += count
    dots = tuple(
        Dot(int(m), int(n), int(k), dtype, "inputPrecision = tf32" in found)
        for found, m, k, dtype, _, n in ((d.group(0), *d.groups()) for d in _DOT.finditer(kernel.asm["ttir"]))
    )
    return Binary(
        registers,
        stack,
        local,
        max(static, kernel.metadata.shared),
        spills,
        dict(sorted(matrix.items())),
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        dots,
        kernel.metadata.num_warps,
    )
