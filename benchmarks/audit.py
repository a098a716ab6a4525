"""Writes docs/static_audit.md: what compilers make of every Triton kernel and every .cu kernel. Needs nvcc, no GPU.

    python -m benchmarks.audit            compiles and writes; exit status 1 on a problem
    python -m benchmarks.audit --check    compiles nothing; exit status 1 if the page is not of the present sources

Triton kernels are those of `python -m mlhead.testing.aot`; their launch bounds give the .cu kernels' threads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlhead.testing import aot, sass

from .audit_page import COMMAND, TARGETS, page, problems
from .cost.devices import DEVICES
from .machine import ROOT
from .records import Row

PAGE = ROOT / "docs" / "static_audit.md"
STATIC_SHARED = 48 * 1024  # bytes that a kernel may declare
SYSTEM_SHARED = 1024  # bytes of the system's in every block; cubins of sm_90 and later count them as the kernel's
CUDA_DTYPES = {"float": "fp32", "double": "fp64", "__half": "fp16", "__nv_bfloat16": "bf16"}
PRODUCTS = ("grouped_product", "attention")  # the .cu kernels that multiply 16-bit matrices


def relevant(path: Path) -> bytes:
    """A source without blank lines and lines of comment only."""
    comment = "#" if path.suffix == ".py" else "//"
    lines = (line.rstrip() for line in path.read_text().splitlines())
    return "\n".join(line for line in lines if line and not line.lstrip().startswith(comment)).encode()


def sources() -> list[Path]:
    """kernels/*.py, csrc/*.cu and what these include of csrc."""
    found = sorted((ROOT / "csrc").glob("*.cu"))
    for path in found:  # grows meanwhile
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.M)
        found += [p for name in names if (p := path.parent / name) not in found]
    return sorted((ROOT / "kernels").glob("*.py")) + sorted(found)


def fingerprints() -> dict[str, str]:
    """The start of the SHA-256 of every source; comments on lines of their own do not count."""
    return {p.relative_to(ROOT).as_posix(): hashlib.sha256(relevant(p)).hexdigest()[:16] for p in sources()}


def out_of_date(page: str) -> list[str]:
    """The sources that differ from those that a page was made from."""
    then = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{16})` \|$", page, re.M))
    now = fingerprints()
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _enums() -> dict[str, list[str]]:
    """The names of the enumerations in the sources, in their order."""
    text = "\n".join(path.read_text() for path in sources() if path.suffix != ".py")
    return {name: re.findall(r"\w+", body) for name, body in re.findall(r"enum class (\w+) \{([^}]*)\}", text)}


def instance(demangled: str, enums: dict[str, list[str]]) -> tuple[str, str, str]:
    """Kernel, dtype and the other template arguments of a .cu kernel's name."""
    found = re.search(r"(\w+)<(.*?)>\(", demangled)
    if found is None:
        raise ValueError(f"no template arguments in {demangled}")
    dtype, *others = found[2].split(", ")
    names = []
    for other in others:
        enum = re.fullmatch(r"\(.*?(\w+)\)(\d+)", other)
        names.append(enums[enum[1]][int(enum[2])] if enum else CUDA_DTYPES.get(other, other))
    return found[1], CUDA_DTYPES[dtype], " ".join(names) or "-"


def demangled(names: list[str]) -> list[str]:
    """Names of functions as they are written."""
    return subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()


def cuda_rows(cubin: Path, op: str, target: str) -> list[Row]:
    """One row for each kernel of a cubin."""
    usage = {name: tuple(map(int, facts)) for name, *facts in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        sass._tool("--dump-resource-usage", str(cubin)),
    )}  # fmt: skip
    threads = {name: int(x, 16) * int(y, 16) * int(z, 16) for name, x, y, z in re.findall(
        r"^\.nv\.info\.(\S+)$(?:(?!^\.nv\.).)*?EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(\S+) (\S+) (\S+)",
        sass._tool("-elf", str(cubin)), re.M | re.S,
    )}  # fmt: skip
    code = re.split(r"Function : (\S+)", sass._tool("--dump-sass", str(cubin)))[1:]
    enums, rows = _enums(), []
    for mangled, name, text in zip(code[::2], demangled(code[::2]), code[1::2], strict=True):
        kernel, dtype, of = instance(name, enums)
        registers, stack, shared, local = usage[mangled]
        if shared and DEVICES[target].capability >= 90:
            shared -= SYSTEM_SHARED
        matrix: Counter[str] = Counter()
        loads: Counter[str] = Counter()
        for opcode in sass._INSTRUCTION.findall(text):
            base = opcode.split(".")[0]
            if sass._MATRIX.fullmatch(base) or base in ("FFMA", "FFMA2"):
                matrix[base] += 1
            elif base in ("LDG", "LDGSTS"):
                loads[sass._width(opcode)] += 1
        row: Row = {
            "op": op, "kernel": kernel, "dtype": dtype, "instance": of, "target": target,
            "warps": -(-threads[mangled] // 32), "registers": registers, "stack": stack, "shared": shared,
            "local": local, "matrix": dict(sorted(matrix.items())), "loads": dict(sorted(loads.items())),
        }  # fmt: skip
        rows.append({**row, "problems": cuda_problems(row)})
    order = list(CUDA_DTYPES.values())
    return sorted(rows, key=lambda r: (r["kernel"], order.index(r["dtype"]), r["instance"]))


def cuda_problems(row: Row) -> list[str]:
    """What is wrong with a .cu kernel."""
    found = []
    if max(row["stack"], row["local"]) > 0:
        found.append(f"stack {row['stack']} B, local {row['local']} B")
    if row["shared"] > STATIC_SHARED:
        found.append(f"{row['shared']} B of shared memory, a kernel may declare {STATIC_SHARED}")
    if row["kernel"] in PRODUCTS and row["dtype"] in ("fp16", "bf16") and "HMMA" not in row["matrix"]:
        found.append("no HMMA")
    return found


def compile_cuda(jobs: int) -> list[Row]:
    """The rows of all .cu kernels for all targets."""
    tasks = [(source, target) for source in sorted((ROOT / "csrc").glob("*.cu")) for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:

        def compiled(task: tuple[Path, str]) -> list[Row]:
            source, target = task
            cubin = Path(folder, f"{source.stem}.{target}.cubin")
            command = ("nvcc", "-O3", "-std=c++17", "-cubin", f"-arch={target}", str(source), "-o", str(cubin))
            subprocess.run(command, check=True)
            return cuda_rows(cubin, source.stem, target)

        return [row for rows in pool.map(compiled, tasks) for row in rows]


def compile_triton(jobs: int) -> list[Row]:
    """The rows of the ahead-of-time compilation of all Triton kernels for all targets."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path = Path(folder, "rows.json")
        wanted = [argument for target in TARGETS for argument in ("--target", target)]
        aot.main([*wanted, "--jobs", str(jobs), "--json", str(path)])
        rows: list[Row] = json.loads(path.read_text())
    return rows


def compiler_versions() -> dict[str, str]:
    """Of Triton, of the assemblers that it comes with, and of nvcc."""
    import triton

    nvidia = triton.knobs.nvidia
    nvcc = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V(\d[\d.]*)", nvcc)
    return {
        "Triton": triton.__version__,
        "ptxas": nvidia.ptxas.version,
        "ptxas (sm_100)": nvidia.ptxas_blackwell.version,
        "nvcc": release[1] if release else "unknown",
    }


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    cli = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    cli.add_argument("--check", action="store_true", help="compile nothing; exit status 1 if the page is out of date")
    cli.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    cli.add_argument("--out", type=Path, default=PAGE, help="file of the page")
    options = cli.parse_args(arguments)
    if options.check:
        stale = out_of_date(options.out.read_text() if options.out.is_file() else "")
        if stale:
            print(f"{options.out.name} is not of {', '.join(stale)}", f"run: {COMMAND}", sep="\n", file=sys.stderr)
        return int(bool(stale))
    for tool in ("nvcc", "c++filt"):
        if shutil.which(tool) is None:
            cli.error(f"{tool} is not on PATH")
    hashes = fingerprints()
    triton, cuda = compile_triton(options.jobs), compile_cuda(options.jobs)
    if fingerprints() != hashes:
        print("the sources changed meanwhile: nothing is written", file=sys.stderr)
        return 1
    options.out.write_text(page(triton, cuda, compiler_versions(), hashes))
    wrong = problems(triton, cuda)
    print(*wrong, f"{options.out}: {len(triton) + len(cuda)} compilations, {len(wrong)} with a problem", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
