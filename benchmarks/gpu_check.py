"""`make gpu-check`: everything that needs a GPU, in one command, within a time that is given.

    python -m benchmarks.gpu_check --minutes 8 --out folder        ($OUT where it is set, else runs/gpu-check)

Builds the extension in place, runs the CUDA conformance tests while compute-sanitizer watches every kernel, then the
benchmarks, the most important rows first. A failing part does not stop the next. It installs nothing, uses no network,
and writes report.txt (the summary), results.jsonl, head.jsonl, overhead.jsonl and end_to_end.jsonl (benchmark rows),
pytest.log, sanitizer.log and logs.txt (the others' output). `--dry-run` does all that can be done without a GPU. Where
the checkout has no .git, MLHEAD_COMMIT says which commit it is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import report
from .machine import ROOT
from .records import op_rows

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LARGEST_LOG = 4 << 20
FAREWELL_S = 10.0  # for a part that is asked to end, in which pytest prints what failed
# The files with tests of mark gpu; others would only be imported, by every worker.
GPU_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in (
        "ops",
        "csra_pool",
        "heads_tracing",
        "losses",
        "loss_ops_blocks",
        "optim",
        "optim_errors",
        "optim_states",
        "overhead",
        "topk",
        "query_attention_infinite",
        "query_attention_triton",
        "class_loss_triton",
    )
)
# Benchmarks with a results file of their own: what they are, their share of the time left, their options.
OTHERS: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "overhead": ("host overhead", 0.1, ("--compile", "none")),
    "end_to_end": ("end to end", 0.15, ("--backbone", "resnet50", "vit_base_patch16_224", "--seconds-each", "0.5")),
}
LOGS = ("machine", "build", "benchmark", "head", *OTHERS)  # one file of them is enough

# Against plain torch a little of each op, then all the rest of it, then what there is time for with torch.compile.
BENCHMARKS = {
    "quick benchmarks": ("--quick", "--compile", "none"),
    "benchmarks": ("--compile", "none", "--resume"),
    "benchmarks with torch.compile": ("--compile", "default", "--dtype", "bf16"),
}


@dataclass
class Part:
    """One command with its log and what became of it.

    Args:
        name: What it does.
        command: Program and arguments.
        log: File that its output is appended to.
        until: Time of the monotonic clock at which it is stopped.
        environment: Variables that it gets beside the present ones.
        stoppable: Whether running out of time is expected of it.
        asked: Whether it was asked to end.
    """

    name: str
    command: list[str]
    log: Path
    until: float
    environment: dict[str, str]
    stoppable: bool = False
    asked: bool = False
    status: str = "not reached"
    seconds: float = 0.0
    note: str = ""

    @property
    def fell_short(self) -> bool:
        """Whether it ended otherwise than it should."""
        fine = ("passed", "not reached", *(["ran out of time"] if self.stoppable else []))
        return self.status not in fine


def _heeds_interrupts() -> None:
    """What a shell has started in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(part: Part) -> tuple[subprocess.Popen, float]:
    with part.log.open("ab") as log:
        log.write(f"== {part.name}: {' '.join(part.command)}\n".encode())
        log.flush()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_heeds_interrupts,
        )  # fmt: skip
    return process, time.monotonic()


def _finished(part: Part, process: subprocess.Popen, began: float) -> bool:
    """Whether the part has ended, by itself or because its time is up; if so, how."""
    late = time.monotonic() > part.until
    if process.poll() is None and not late:
        return False
    if process.poll() is None and not part.asked:
        part.asked = True
        part.until += FAREWELL_S
        process.send_signal(signal.SIGINT)
        return False
    if part.asked or process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        process.wait()
        part.status = "ran out of time"
    else:
        part.status = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    part.seconds = time.monotonic() - began
    # The last line of most programs says how it went.
    lines = [line for line in part.log.read_text(errors="replace").splitlines()[-30:] if line.strip(" =-")]
    part.note = lines[-1].strip(" =")[:150] if lines else ""
    print(f"  {part.name}: {part.status}, {part.seconds:.0f} s. {part.note}", flush=True)
    return True


def run_together(parts: Iterable[Part]) -> None:
    """Runs parts at the same time, and waits for all."""
    running = []
    for part in parts:
        if part.until - time.monotonic() < 5:
            continue
        print(f"  {part.name} ...", flush=True)
        try:
            running.append((part, *_start(part)))
        except OSError as error:
            part.status, part.note = "failed", str(error)
    while running:
        running = [entry for entry in running if not _finished(*entry)]
        time.sleep(0.05)


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside the CUDA compiler."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or (str(Path(nvcc).resolve().parent.parent) if nvcc else "/usr/local/cuda")
    places = [
        shutil.which("compute-sanitizer"),
        f"{home}/bin/compute-sanitizer",
        f"{home}/compute-sanitizer/compute-sanitizer",
        "/usr/local/cuda/bin/compute-sanitizer",
    ]
    return next((place for place in places if place and Path(place).is_file()), None)


def build_part(out: Path, until: float, scratch: Path | None) -> Part:
    """The extension, in place; where there is no GPU, into a folder of its own for a common architecture."""
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {"MLHEAD_BUILD": "cuda"}
    if scratch is None:
        command.append("--inplace")
    else:
        command += ["--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "temp")]
        environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")
    return Part("build of the CUDA extension", command, out / "build.log", until, environment)


def check_parts(out: Path, until: float, dry: bool) -> list[Part]:
    """The conformance tests, and compute-sanitizer's tools."""
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-W", "default", *GPU_TESTS]
    tests.append("--continue-on-collection-errors")
    if dry:
        tests.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        # Most of the time goes into compiling Triton kernels, on one core each.
        tests += ["-n", str(max(1, min(10, (os.cpu_count() or 2) * 2 // 3)))]
    parts = [Part("CUDA conformance tests", tests, out / "pytest.log", until, {})]
    target = [sys.executable, "-m", "benchmarks.touch"]
    if dry:
        return [*parts, Part("calls for the sanitizers", [*target, "--list"], out / "sanitizer.log", until, {})]
    sanitizer = find_sanitizer()
    for tool in TOOLS:
        # Without torch's own pool every tensor is an allocation of its own, with bounds that can be checked.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer or "", "--tool", tool, "--error-exitcode", "99", "--print-limit", "20", *target]
        part = Part(f"compute-sanitizer {tool}", command, out / f"sanitizer-{tool}.log", until, environment)
        if sanitizer is None:
            part.status, part.note, part.until = "not reached", "compute-sanitizer is not installed", 0.0
        parts.append(part)
    return parts


def benchmark_part(name: str, out: Path, until: float, dry: bool) -> Part:
    """One of BENCHMARKS; they share a results file and a log."""
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--out", str(out / "results.jsonl")]
    command += BENCHMARKS[name]
    if dry:
        return Part(name, [*command, "--list"], out / "benchmark.log", until, {})
    minutes = max(0.1, (until - time.monotonic() - 25) / 60)
    return Part(name, [*command, "--minutes", f"{minutes:.2f}"], out / "benchmark.log", until, {}, stoppable=True)


def head_part(out: Path, until: float, dry: bool, *options: str) -> Part:
    """The whole ML-Decoder head against the papers' and plain torch's."""
    command = [sys.executable, "-m", "benchmarks.head", "--device", "cuda", "--seconds-each", "0.5"]
    command += ["--help"] if dry else ["--out", str(out / "head.jsonl"), *options]
    name = " with torch.compile" if "--compile" in options else ""
    return Part(f"benchmark of the whole head{name}", command, out / "head.log", until, {}, stoppable=True)


def command_part(name: str, module: str, out: Path, until: float, dry: bool, *options: str) -> Part:
    """Another benchmark, whose rows go to a file of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    command += ["--help"] if dry else ["--device", "cuda", "--out", str(out / f"{module}.jsonl"), *options]
    return Part(name, command, out / f"{module}.log", until, {}, stoppable=True)


def gather_logs(out: Path) -> None:
    """The sanitizers' logs as one file, those of the smaller parts as another, and none larger than it has to be."""
    with (out / "logs.txt").open("wb") as whole:
        for name in LOGS:
            log = out / f"{name}.log"
            if log.is_file():
                whole.write(f"==== {name}\n".encode() + log.read_bytes() + b"\n")
                log.unlink()
    logs = sorted(out.glob("sanitizer-*.log"))
    if logs:
        with (out / "sanitizer.log").open("ab") as whole:
            for log in logs:
                whole.write(log.read_bytes() + b"\n")
                log.unlink()
    for log in (*out.glob("*.log"), out / "logs.txt"):
        if log.stat().st_size > LARGEST_LOG:
            half = LARGEST_LOG // 2
            content = log.read_bytes()
            log.write_bytes(content[:half] + b"\n[... cut ...]\n" + content[-half:])


def summary(parts: list[Part], out: Path) -> str:
    """The report: every part, the benchmark table, what fell short and what was not reached."""
    rows = op_rows(out / "results.jsonl")
    lines = ["mlhead gpu-check", ""]
    info = out / "machine.log"
    lines += info.read_text(errors="replace").splitlines() if info.is_file() else []
    lines += ["", f"{'part':<36} {'result':<18} {'seconds':>7}  last words"]
    lines += [f"{p.name:<36} {p.status:<18} {p.seconds:>7.0f}  {p.note}" for p in parts]
    if rows:
        lines += ["", report.table(rows), report.verdicts(rows)]
    short = [f"  {p.name}: {p.status}" for p in parts if p.fell_short]
    short += [
        f"  {row['title'].split('  ')[0]}, {row['provider']}: {row['status']}: {row['message']}"
        for row in rows
        if row["kind"] == "mlhead" and row["status"] != "ok" and row["pass"] == "both"
    ]
    unreached = [f"  {p.name}: {p.note}" for p in parts if p.status == "not reached"]
    log = out / "benchmark.log"
    if log.is_file():
        lists = re.findall(r"^Not reached:\n((?:  .*\n?)+)", log.read_text(errors="replace"), re.M)
        unreached += list(dict.fromkeys(line for text in lists for line in text.splitlines()))[:40]
    for title, found in (("Fell short:", short), ("Not reached:", unreached)):
        lines += ["", title, *(found or ["  nothing"])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check"))
    parser.add_argument("--skip", action="append", default=[], choices=("build", "checks", "benchmarks"))
    parser.add_argument("--dry-run", action="store_true", help="do all but launch on a GPU")
    options = parser.parse_args(arguments)
    dry, out = options.dry_run, options.out.resolve()
    if not dry and not torch.cuda.is_available():
        print("gpu-check: no CUDA device is visible; --dry-run does what can be done without one", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in (
        "report.txt",
        "logs.txt",
        "results.jsonl",
        *(f"{rows}.jsonl" for rows in ("head", *OTHERS)),
        *(f"{log}.log" for log in ("pytest", *LOGS)),
    ):
        (out / name).unlink(missing_ok=True)
    for log in out.glob("sanitizer*.log"):
        log.unlink()

    began = time.monotonic()
    end = began + 60 * options.minutes
    parts: list[Part] = []

    def run(*new: Part) -> None:
        parts.extend(new)
        run_together(part for part in new)
        # Written after each part, so that something is there whenever the machine is taken away.
        (out / "report.txt").write_text(summary(parts, out))

    with tempfile.TemporaryDirectory() as scratch:
        if "build" not in options.skip:
            run(build_part(out, min(end, began + 240), Path(scratch) if dry else None))
        command = [sys.executable, "-m", "mlhead", "info"]
        run(Part("machine", command, out / "machine.log", time.monotonic() + 60, {}))
        if "checks" not in options.skip:
            share = 0.97 if "benchmarks" in options.skip else 0.55
            run(*check_parts(out, began + share * (end - began), dry))
        if "benchmarks" not in options.skip:
            run(head_part(out, time.monotonic() + 0.2 * (end - time.monotonic()), dry))
            for module, (name, share, settings) in OTHERS.items():
                until = time.monotonic() + share * (end - time.monotonic())
                run(command_part(name, module, out, until, dry, *settings))
            for name in list(BENCHMARKS)[: 2 if dry else None]:  # the third has no groups of its own
                # In less than a minute no row is made.
                run(benchmark_part(name, out, end - 5 if dry or end - time.monotonic() > 60 else 0.0, dry))
                if name == "quick benchmarks":
                    # Torch.compile takes minutes for one workload, of which no row is written before the end.
                    share = 0.4 * (end - time.monotonic())
                    compiled = ("--compile", "default", "--workload", "imagenet")
                    run(head_part(out, time.monotonic() + share if dry or share > 90 else 0.0, dry, *compiled))
    (out / "report.txt").write_text(summary(parts, out))
    gather_logs(out)
    print((out / "report.txt").read_text())
    print(f"written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))
    return int(any(part.fell_short for part in parts))


if __name__ == "__main__":
    sys.exit(main())
