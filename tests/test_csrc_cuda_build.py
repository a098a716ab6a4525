"""Every .cu compiled for sm_80, sm_90, sm_100: no stack, no spills, shared memory fits, the instructions meant."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc").glob("*.cu"))
NVCC = shutil.which("nvcc")
STATIC_SHARED_BYTES = 48 * 1024
# Types, roles and widths: group_fc has 21 products, 4 sums of parts and 4 column sums; csra_pool has 6 of
# either pass and 6 of the gradient through the norm; query_attention has 7 of each of its four results, 4 row products
# and 4 sums of chunks; dropout_add_layer_norm has 16 of either pass, 4 column sums and 4 sums of parts; relu_dropout
# has 8 of either pass.
KERNELS = {
    "group_fc": 29,
    "csra_pool": 18,
    "query_attention": 36,
    "dropout_add_layer_norm": 40,
    "relu_dropout": 16,
    "class_loss": 22,
}
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


# The others are slow: docs/static_audit.md has them, and tests/test_audit.py holds it to the sources.
@pytest.fixture(
    scope="module",
    params=["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100"))],
)
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    built = {}
    for source in SOURCES:
        cubin = built[source.stem] = folder / f"{source.stem}.cubin"
        assert NVCC is not None
        _output(NVCC, "-O3", "-std=c++17", "-cubin", f"-arch={request.param}", str(source), "-o", str(cubin))
    return built


def _functions(cubin: Path) -> dict[str, str]:
    """The disassembly of every kernel."""
    found = _FUNCTION.split(_output(_cuobjdump(), "--dump-sass", str(cubin)))[1:]
    return dict(zip(found[::2], found[1::2], strict=True))


def _check_registers_only(functions: dict[str, str]) -> None:
    for name, sass in functions.items():
        assert " STL" not in sass, f"{name} stores to local memory"
        assert " LDL" not in sass, f"{name} loads from local memory"


def test_there_is_something_to_compile() -> None:
    assert {source.stem for source in SOURCES} == KERNELS.keys()


def test_sources_have_no_torch_headers() -> None:
    for source in SOURCES:
        for file in (source, source.with_suffix(".h")):
            assert "torch/" not in file.read_text(), file
            assert "ATen" not in file.read_text(), file


def test_resources(cubins: dict[str, Path]) -> None:
    for op, cubin in cubins.items():
        rows = _USAGE.findall(_output(_cuobjdump(), "--dump-resource-usage", str(cubin)))
        assert len(rows) == KERNELS[op]
        for name, registers, stack, shared, local in rows:
            assert int(stack) == 0, f"{name} has a stack of {stack} bytes"
            assert int(local) == 0, f"{name} uses {local} bytes of local memory"
            assert int(shared) <= STATIC_SHARED_BYTES, f"{name} wants {shared} bytes of shared memory"
            assert int(registers) <= 255


def test_matrix_instructions_of_group_fc(cubins: dict[str, Path]) -> None:
    products = {n: s for n, s in _functions(cubins["group_fc"]).items() if "grouped_product" in n}
    _check_registers_only(products)
    half = {n: s for n, s in products.items() if "half" in n or "bfloat16" in n}
    assert len(half) == 12  # two types, three roles, with and without vector loads
    assert len(products) == 12 + 6 + 3
    for name, sass in products.items():
        assert ("HMMA.16816.F32" in sass) == (name in half), name
    wide = [sass for name, sass in products.items() if re.search(r"Li[48]E", name)]
    assert wide
    assert all(re.search(r"LDG\.E(\.\w+)*\.128", sass) for sass in wide)


def test_instructions_of_csra_pool(cubins: dict[str, Path]) -> None:
    """No atomics, no matrix products, and four blocks of 256 threads for each multiprocessor, two for fp64."""
    functions = _functions(cubins["csra_pool"])
    _check_registers_only(functions)
    for name, sass in functions.items():
        assert not re.search(r"\b(ATOM[GS]?|RED|[HDIQ]G?MMA)\b", sass), name
        assert "MUFU.EX2" in sass or "IdLi1E" in name or "unit_rows" in name, name
    rows = _USAGE.findall(_output(_cuobjdump(), "--dump-resource-usage", str(cubins["csra_pool"])))
    assert all(int(registers) <= (128 if "IdLi1E" in name else 64) for name, registers, *_ in rows)
    pairs = {name: sass for name, sass in functions.items() if "Li2E" in name and "backward" in name}
    assert len(pairs) == 2  # fp16 and bf16
    for name, sass in pairs.items():
        assert "STG.E.U16" not in sass, f"{name} writes single columns"
