"""Resident memory of this process."""

from __future__ import annotations

from pathlib import Path


def resident() -> tuple[int, int]:
    """Resident memory in bytes, now and at the most; zeros where the system does not tell.

    Not from getrusage: its ru_maxrss begins, in a new process, at what the process that started it had.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
             if name in ("VmRSS", "VmHWM")}  # fmt: skip
    return found.get("VmRSS", 0), found.get("VmHWM", 0)


def peak() -> int:
    """The most resident memory so far, in bytes."""
    return resident()[1]
