"""Building: a plain wheel needs no compiler and no torch; the extension is one abi3 wheel, and says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("csrc", "kernels", "mlhead", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
CALL = """
import torch, mlhead
from mlhead.testing import CASES, check, oracle, plain_torch
sample = CASES["group_fc"].make({"B": 3, "G": 4, "E": 40, "C": 70}, torch.float32, "cpu", 0)
results, exact, plain = sample.run("cpp"), oracle(sample), plain_torch(sample)
for name in results:
    check(name, results[name], exact[name], plain[name])
print("ok", torch.__version__, mlhead.__file__)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def _wheel(checkout: Path, mode: str, **environment: str) -> subprocess.CompletedProcess:
    for module in ("setuptools", "wheel", "pip"):
        pytest.importorskip(module, reason="needed to build without build isolation")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    variables = {**os.environ, "MLHEAD_BUILD": mode, **environment}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)


def _only(checkout: Path) -> Path:
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


def test_plain_wheel_is_pure(checkout: Path) -> None:
    result = _wheel(checkout, "none")
    assert result.returncode == 0, result.stderr
    wheel = _only(checkout)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "mlhead/kernels/group_fc.py" in names
    assert "mlhead/py.typed" in names
    assert not [n for n in names if n.startswith(("csrc", "tests", "kernels", "benchmarks")) or n.endswith(".so")]


def test_without_a_compiler(checkout: Path) -> None:
    """An explicit request fails and names what is missing; auto makes the plain wheel and says why."""
    result = _wheel(checkout, "cpu", CXX="/nonexistent/c++")
    assert result.returncode != 0
    assert "/nonexistent/c++" in result.stdout + result.stderr
    result = _wheel(checkout, "auto", CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert _only(checkout).name.endswith("-py3-none-any.whl")
    assert "/nonexistent/c++" in result.stdout + result.stderr


def test_unknown_mode_is_an_error(checkout: Path) -> None:
    result = _wheel(checkout, "fast")
    assert result.returncode != 0
    assert "MLHEAD_BUILD" in result.stdout + result.stderr


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_one_abi3_wheel(checkout: Path, tmp_path: Path) -> None:
    """With this interpreter, and with the one that MLHEAD_OTHER_PYTHON names (another torch, another Python)."""
    compiler = tmp_path / "c++"  # without optimisation, which is most of the minute that it would take
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    result = _wheel(checkout, "cpu", CXX=str(compiler))
    assert result.returncode == 0, result.stderr
    wheel = _only(checkout)
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")] == ["mlhead/_mlhead_cpu.abi3.so"]
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    pythons = [sys.executable, *filter(None, [os.environ.get("MLHEAD_OTHER_PYTHON")])]
    for python in pythons:
        variables = {**os.environ, "PYTHONPATH": str(installed)}
        called = subprocess.run([python, "-c", CALL], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert called.returncode == 0, called.stderr
        assert str(installed) in called.stdout
