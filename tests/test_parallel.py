"""Heads over several devices: the checks of parallel_checks.py in groups of gloo processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel_checks import checks

WORLDS = (2, 4)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """For each number of processes what every one of them found."""
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"world{world}")
        files = [folder / f"{rank}.json" for rank in range(world)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.parallel_checks", file, str(rank), str(world), folder / "store"],
                env=environment,
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, file in enumerate(files)
        ]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert all(file.is_file() for file in files), errors
        found[world] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("name", checks())
@pytest.mark.parametrize("world", WORLDS)
def test_is_as_the_whole_head(outcomes: dict[int, list[dict[str, str]]], world: int, name: str) -> None:
    for rank, outcome in enumerate(outcomes[world]):
        assert outcome.get(name, "did not run, for an earlier check failed on another device") == "", f"device {rank}"
