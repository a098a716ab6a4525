"""Peak memory of an op's passes on a CPU: what each provider adds to the resident memory of a process of its own.

    python -m benchmarks.peaks '{"op": "csra_pool", "workload": "small", "dims": {...}, "dtype": "fp32",
                                 "provider": "mlhead: cpp", "seed": 0}'

`benchmarks.run` asks so, but not of torch.compile, which would compile again. What a provider's libraries keep after
their first calls is there before: it runs a small size first. Scratch that grows with the size and stays counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlhead._resident import peak

from .plan import DTYPES, Group, shrink

# What is freed goes back to the system at once, so that what is resident is alive.
QUICK_RETURN = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_ELEMENTS = 1 << 14


def in_process(group: Group, provider: str, seed: int, limit_s: float = 600.0) -> dict[str, float | None]:
    """MiB of the forward, the backward (with the forward before it) and both; None where that is not known.

    Raises:
        RuntimeError: The process failed, or took longer than `limit_s` seconds.
    """
    if not peak() or provider.startswith("compile"):
        return dict.fromkeys(("forward", "backward", "both"))
    about = {"op": group.op, "workload": group.workload, "dims": dict(group.dims), "dtype": group.dtype}
    command = [sys.executable, "-m", "benchmarks.peaks", json.dumps({**about, "provider": provider, "seed": seed})]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **QUICK_RETURN}, timeout=limit_s
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"peak memory of {provider}: not known after {limit_s:.0f} s") from error
    if run.returncode:
        raise RuntimeError(f"peak memory of {provider}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    found: dict[str, float | None] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def measure(group: Group, provider: str, seed: int) -> dict[str, float]:
    """The same, of this process: to be called once in it."""
    from .run import arranged, pass_functions, providers_of  # which imports this module

    function = providers_of(group, "cpu", None, ())[provider]
    dtype, case = DTYPES[group.dtype], group.case
    small = case.make(shrink(case, group.dims, WARM_ELEMENTS)[0], dtype, "cpu", seed)
    sample = case.make(group.dims, dtype, "cpu", seed)
    passes = pass_functions(arranged(group.op, provider, sample), function)
    warm = pass_functions(arranged(group.op, provider, small), function)
    for run in (warm["forward"], warm["both"]):
        run()
    found = {}
    for key in ("forward", "both"):
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        passes[key]()
        found[key] = (peak() - before) / 2**20
    return {**found, "backward": found["both"]}


def main() -> int:
    """Prints one line of JSON."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    group = Group(settings["op"], settings["workload"], settings["dims"], settings["dtype"])
    print(json.dumps(measure(group, settings["provider"], settings["seed"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
