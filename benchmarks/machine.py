"""What every row says about where it was measured: device, driver, versions, commit, and in which run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

RUN = token_hex(4)  # of this process
ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@cache
def commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it.

    Outside a checkout both come from the variable MLHEAD_COMMIT, "0123456789ab" or "0123456789ab+dirty", or are not
    known.
    """
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    if name is None:
        given = os.environ.get("MLHEAD_COMMIT", "")
        known = given.removesuffix("+dirty")[:12]
        return {"commit": known or "unknown", "dirty": given.endswith("+dirty") if known else None}
    return {"commit": name, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}


@cache
def facts(device: str) -> dict[str, Any]:
    """Device, driver, versions, commit and run, as they go into every row."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        about: dict[str, Any] = {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": driver,
        }
        versions["cuda"] = torch.version.cuda
    else:
        about = {"device": _cpu_name(), "threads": torch.get_num_threads()}
    return {**about, "versions": versions, **commit(), "run": RUN}


def slug(device: str) -> str:
    """The device's name as a folder's."""
    about = facts(device)
    name = about["device"] if device == "cuda" else f"{about['device']} {about['threads']} threads"
    name = re.sub(r"\((r|tm)\)|\bcpu\b", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


def results_file(device: str) -> Path:
    """Where the rows of this device and commit go."""
    return ROOT / "benchmarks" / "results" / slug(device) / f"{commit()['commit']}.jsonl"


def banner(device: str) -> str:
    """Device, torch and commit in one line for people."""
    about = facts(device)
    return f"{about['device']}, torch {torch.__version__}, commit {about['commit']}{' (dirty)' * bool(about['dirty'])}"
