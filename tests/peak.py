"""Peak memory of a script in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mlhead._resident import peak


def printed_by(script: str, *arguments: object) -> int:
    """The number that a script prints, run alone, where what is freed goes back to the system at once."""
    if not peak():
        pytest.skip("needs the peak of Linux's /proc")
    # Where a CPU multiplies bf16, torch's products pack operands into memory of their own: that is not looked for.
    settings = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **settings},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return int(result.stdout)
