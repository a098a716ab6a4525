"""Every .cu compiled for sm_80, sm_90, sm_100: no stack, no spills, shared memory fits, tensor cores in 16 bit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")
STATIC_SHARED_BYTES = 48 * 1024
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"Function : (\S+)")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def _cuobjdump() -> str:
    """The disassembler of the CUDA toolkit, or the one that Triton ships."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    triton = pytest.importorskip("triton", reason="neither the CUDA toolkit's nor Triton's cuobjdump is there")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    built = []
    for source in SOURCES:
        built.append(folder / f"{source.stem}.cubin")
        assert NVCC is not None
        _output(NVCC, "-O3", "-std=c++17", "-cubin", f"-arch={request.param}", str(source), "-o", str(built[-1]))
    return built


def test_there_is_something_to_compile() -> None:
    assert [source.name for source in SOURCES] == ["group_fc.cu"]


def test_sources_have_no_torch_headers() -> None:
    for source in SOURCES:
        for file in (source, source.with_suffix(".h")):
            assert "torch/" not in file.read_text(), file
            assert "ATen" not in file.read_text(), file


def test_resources(cubins: list[Path]) -> None:
    for cubin in cubins:
        rows = _USAGE.findall(_output(_cuobjdump(), "--dump-resource-usage", str(cubin)))
        assert len(rows) > 20
        for name, registers, stack, shared, local in rows:
            assert int(stack) == 0, f"{name} has a stack of {stack} bytes"
            assert int(local) == 0, f"{name} uses {local} bytes of local memory"
            assert int(shared) <= STATIC_SHARED_BYTES, f"{name} wants {shared} bytes of shared memory"
            assert int(registers) <= 255


def test_matrix_instructions(cubins: list[Path]) -> None:
    for cubin in cubins:
        functions = _FUNCTION.split(_output(_cuobjdump(), "--dump-sass", str(cubin)))[1:]
        products = {n: s for n, s in zip(functions[::2], functions[1::2], strict=True) if "grouped_product" in n}
        half = {n: s for n, s in products.items() if "half" in n or "bfloat16" in n}
        assert len(half) == 12  # two types, three roles, with and without vector loads
        assert len(products) == 12 + 6 + 3
        for name, sass in products.items():
            assert ("HMMA.16816.F32" in sass) == (name in half), name
            assert " STL" not in sass, f"{name} stores to local memory"
            assert " LDL" not in sass, f"{name} loads from local memory"
        wide = [sass for name, sass in products.items() if re.search(r"Li[48]E", name)]
        assert wide
        assert all(re.search(r"LDG\.E(\.\w+)*\.128", sass) for sass in wide)
