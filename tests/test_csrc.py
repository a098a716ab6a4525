"""The functions inside csrc, through the test-only module mlhead._C: products, packing, plans, conversions, checks.

The module is built into build/csrc-tests (ninja rebuilds only what changed). Every instruction set of this processor is
tested, and "wide", the tile shapes of AVX-512 compiled for AVX2.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "csrc-tests"
STORED = {"f32": np.float32, "f64": np.float64, "f16": np.uint16, "bf16": np.uint16}
# The unit roundoff of the sums, and of what is stored.
SUM_EPS = {"f32": 2.0**-24, "f64": 2.0**-53, "f16": 2.0**-24, "bf16": 2.0**-24}
STORE_EPS = {"f32": 2.0**-24, "f64": 2.0**-53, "f16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="session")
def C() -> ModuleType:  # noqa: N802
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"mlhead._C cannot be built: {tool} is not there")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("mlhead._C cannot be built: pybind11 is not installed")
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(FOLDER), "--build-temp", str(FOLDER / "temp")]
    variables = {**os.environ, "MLHEAD_BUILD": "none", "MLHEAD_BUILD_TESTS": "1"}
    built = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (FOLDER / "mlhead").glob(f"_C.{sys.implementation.cache_tag}*.so")
    spec = importlib.util.spec_from_file_location("mlhead._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def widened(C: ModuleType, dtype: str, stored: np.ndarray) -> np.ndarray:
    """The numbers that an array of storage stands for, in fp64."""
    if dtype in ("f32", "f64"):
        return stored.astype(np.float64)
    return (C.widened if dtype == "f16" else C.widened_bf16)(stored).astype(np.float64)


def stored(C: ModuleType, dtype: str, numbers: np.ndarray) -> np.ndarray:
    """Numbers as they are stored."""
    if dtype in ("f32", "f64"):
        return numbers.astype(STORED[dtype])
    return (C.rounded if dtype == "f16" else C.rounded_bf16)(numbers.astype(np.float32))


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers with other strides; what lies between them is poison."""
    poison = np.full(array.dtype.itemsize, 0xFF, np.uint8).view(array.dtype)[0]  # a NaN in each of the types
    rows, columns = array.shape
    if layout == "rows":
        return np.ascontiguousarray(array)
    if layout == "columns":
        return np.ascontiguousarray(array.T).T
    wide = np.full((2 * rows + 1, 3 * columns + 2), poison, array.dtype)
    view = wide[1 : 2 * rows : 2, 2::3][:rows, :columns] if layout == "strided" else wide[1 : rows + 1, 1 : columns + 1]
    view[...] = array
    return view


def run(C: ModuleType, isa: str, dtype: str, M: int, N: int, K: int, layouts: str, **options: Any) -> dict[str, Any]:
    """One product, compared with the exact one; what surrounds C must stay as it was."""
    names = {"r": "rows", "c": "columns", "s": "strided", "w": "window"}
    random = np.random.default_rng(M * 1000003 + N * 1009 + K)
    a = laid_out(stored(C, dtype, random.standard_normal((M, K))), names[layouts[0]])
    b = laid_out(stored(C, dtype, random.standard_normal((K, N))), names[layouts[1]])
    around = np.full((M + 2, N + 2), 77, STORED[dtype])
    if layouts[2] == "c":
        around = np.full((N + 2, M + 2), 77, STORED[dtype]).T
    c = around[1 : M + 1, 1 : N + 1]
    c[...] = np.full(c.dtype.itemsize, 0xFF, np.uint8).view(c.dtype)[0]
    bias = random.standard_normal(N).astype(np.float64 if dtype == "f64" else np.float32)
    with_bias = options.pop("bias", False)
    plan = C.gemm(isa, dtype, a, b, c, bias=bias if with_bias else None, **options)

    exact_a, exact_b = widened(C, dtype, a), widened(C, dtype, b)
    exact, size = exact_a @ exact_b, np.abs(exact_a) @ np.abs(exact_b)
    if with_bias:
        exact, size = exact + bias, size + np.abs(bias)
    limit = (K + 2) * SUM_EPS[dtype] * size + STORE_EPS[dtype] * np.abs(exact) + 1e-7 * (dtype == "f16")
    error = np.abs(widened(C, dtype, c) - exact)
    assert (error <= limit).all(), (isa, dtype, M, N, K, layouts, options, plan, float(np.nanmax(error - limit)))
    frame = np.ones(around.shape, bool)
    frame[1 : M + 1, 1 : N + 1] = False
    assert (around[frame] == 77).all(), (isa, dtype, M, N, K, layouts, options, plan)
    return plan


def test_chosen_instruction_set(C: ModuleType) -> None:
    names = C.instruction_sets()
    assert names[0] == "baseline"
    assert C.chosen_instruction_set() == [n for n in ("baseline", "avx2", "avx512") if n in names][-1]
    with pytest.raises(ValueError, match="name must be an instruction set of this processor, got sse9"):
        C.lanes("sse9", "f32")


SIZES = (1, 2, 3, 5, 8, 9, 11, 16, 23, 25, 33, 48, 97)


@pytest.mark.parametrize("axis", ["n", "m", "k"])
@pytest.mark.parametrize("dtype", list(STORED))
def test_products(C: ModuleType, dtype: str, axis: str) -> None:
    """Every vector axis at every kind of edge, blocks smaller than the matrix included."""
    random = np.random.default_rng(len(dtype) + ord(axis))
    for isa in C.instruction_sets():
        for M, N in itertools.product(SIZES, SIZES):
            K = int(random.choice(SIZES))
            layouts = "".join(random.choice(list("rcsw"), 2)) + random.choice(["r", "c"])
            bias = axis != "m" and bool(random.integers(2))  # bias runs along n, and so must the vectors
            block_k, block_m = random.choice([[256, 96], [4, 96], [7, 16], [256, 17]])
            plan = run(C, isa, dtype, M, N, K, layouts, axis=axis, bias=bias, block_k=block_k, block_m=block_m)
            assert plan["axis"] == axis


@pytest.mark.parametrize("layout", ["".join(x) for x in itertools.product("rcsw", "rcsw", "rc")])
def test_layouts(C: ModuleType, layout: str) -> None:
    """Whatever the plan chooses for these strides."""
    for dtype in STORED:
        for M, N, K in ((64, 97, 70), (7, 30, 300), (40, 1, 33), (1, 40, 5), (33, 64, 97)):
            run(C, "baseline", dtype, M, N, K, layout)
            run(C, C.chosen_instruction_set(), dtype, M, N, K, layout, bias=True)


@pytest.mark.parametrize("rows", range(1, 40))
def test_rows_in_16_bit(C: ModuleType, rows: int) -> None:
    """Every number of rows against a block of 16: a short last block must still convert B."""
    for isa in C.instruction_sets():
        for axis in "nmk":
            run(C, isa, "bf16", rows, 21, 19, "rrr", axis=axis, block_m=16)
            run(C, isa, "f16", 21, rows, 19, "crr", axis=axis, block_m=16)


def test_empty_sums(C: ModuleType) -> None:
    for isa, dtype in itertools.product(C.instruction_sets(), STORED):
        for axis in "nk":
            run(C, isa, dtype, 5, 9, 0, "rrr", axis=axis, bias=True)
        run(C, isa, dtype, 5, 9, 0, "rrr", axis="m")


def test_broadcast_operands(C: ModuleType) -> None:
    """Stride 0, as an expanded tensor has."""
    for isa, axis in itertools.product(C.instruction_sets(), "nmk"):
        for shape_a, shape_b in (((1, 1), (1, 1)), ((9, 1), (1, 21)), ((1, 13), (13, 1))):
            a = np.broadcast_to(np.random.default_rng(0).standard_normal(shape_a).astype(np.float32), (9, 13))
            b = np.broadcast_to(np.random.default_rng(1).standard_normal(shape_b).astype(np.float32), (13, 21))
            c = np.empty((9, 21), np.float32)
            C.gemm(isa, "f32", a, b, c, axis=axis)
            np.testing.assert_allclose(c, a.astype(float) @ b.astype(float), rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_place(C: ModuleType) -> None:
    """Padding and surplus lanes must not spread what they hold."""
    for isa, dtype, axis in itertools.product(C.instruction_sets(), STORED, "nmk"):
        a, b = np.ones((9, 10)), np.ones((10, 13))
        a[3, 4], b[2, 12] = np.nan, np.inf
        c = np.zeros((9, 13), STORED[dtype])
        C.gemm(isa, dtype, stored(C, dtype, a), stored(C, dtype, b), c, axis=axis)
        result = widened(C, dtype, c)
        expected = np.full((9, 13), 10.0)
        expected[:, 12] = np.inf
        expected[3, :] = np.nan
        np.testing.assert_array_equal(result, expected)


def test_column_sum(C: ModuleType) -> None:
    random = np.random.default_rng(3)
    for isa, dtype in itertools.product(C.instruction_sets(), STORED):
        for rows, columns, layout in itertools.product((0, 1, 33, 300), (1, 7, 513), ("rows", "columns", "strided")):
            x = laid_out(stored(C, dtype, random.standard_normal((rows, columns))), layout)
            out = np.full(columns, 77, STORED[dtype])
            C.column_sum(isa, dtype, x, out)
            exact, size = widened(C, dtype, x).sum(0), np.abs(widened(C, dtype, x)).sum(0)
            limit = rows * SUM_EPS[dtype] * size + STORE_EPS[dtype] * np.abs(exact) + 1e-7 * (dtype == "f16")
            assert (np.abs(widened(C, dtype, out) - exact) <= limit).all(), (isa, dtype, rows, columns, layout)


def test_widening_is_exact(C: ModuleType) -> None:
    """All 65,536 numbers of both 16-bit types."""
    bits = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(C.widened(bits), bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(C.widened_bf16(bits), (bits.astype(np.uint32) << 16).view(np.float32))


def _awkward_floats() -> np.ndarray:
    """Numbers around every rounding decision of both types: exact, ties, one unit beside them, all magnitudes."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    brains = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    exact = np.concatenate([halves, brains])
    bits = exact.view(np.uint32).astype(np.int64)
    offsets = (0, 1, -1, 0x1000, 0xFFF, 0x1001, 0x8000, 0x7FFF, 0x8001)
    near = np.concatenate([np.clip(bits + o, 0, 2**32 - 1).astype(np.uint32) for o in offsets]).view(np.float32)
    return near[~np.isnan(near)]


def test_rounding_is_to_nearest_even(C: ModuleType) -> None:
    x = _awkward_floats()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(C.rounded(x), x.astype(np.float16).view(np.uint16))
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(C.rounded_bf16(x), expected)
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(C.widened(C.rounded(nans))).all()
    assert np.isnan(C.widened_bf16(C.rounded_bf16(nans))).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_vectors_round_like_scalars(C: ModuleType, dtype: str) -> None:
    """A sum of a 16-bit number and a tiny one, rounded by each instruction set as by the scalar function."""
    high = _awkward_floats()
    high = widened(C, dtype, stored(C, dtype, high[np.abs(high) < 1e30])).astype(np.float32)
    high = high[np.isfinite(high)][: 40 * 4096].reshape(1, -1)
    with np.errstate(over="ignore", invalid="ignore"):
        low = (high * np.float32(2.0**-9)).astype(np.float32)
    b = stored(C, dtype, np.concatenate([high, low]))
    total = widened(C, dtype, b).astype(np.float32).sum(0, dtype=np.float32)
    expected = stored(C, dtype, total)
    one = stored(C, dtype, np.ones((1, 2)))
    for isa in C.instruction_sets():
        c = np.zeros((1, b.shape[1]), np.uint16)
        C.gemm(isa, dtype, one, b, c, axis="n")
        np.testing.assert_array_equal(c[0], expected)


def _plan(C: ModuleType, M: int, N: int, K: int, layouts: str = "rrr", **options: Any) -> dict[str, Any]:
    def matrix(rows: int, columns: int, layout: str) -> np.ndarray:
        return np.zeros((rows, columns), np.float32) if layout == "r" else np.zeros((columns, rows), np.float32).T

    a, b, c = matrix(M, K, layouts[0]), matrix(K, N, layouts[1]), matrix(M, N, layouts[2])
    return C.plan("f32", a, b, c, lanes=8, **options)


def test_plans(C: ModuleType) -> None:
    """The choices that the speed of the named workloads rests on; the arguments are the three products' shapes."""
    assert _plan(C, 64, 97, 768, copies=100)["axis"] == "n"  # forward
    assert _plan(C, 64, 768, 97, "rcr", copies=100)["axis"] == "m"  # dh: weight read in place, dlogits packed
    assert _plan(C, 768, 97, 64, "crr", copies=100)["axis"] == "n"  # dweight
    assert _plan(C, 64, 1, 768, copies=80)["axis"] == "k"  # J = 1: a batch of dot products
    assert _plan(C, 256, 10, 768, copies=100)["axis"] == "k"
    assert _plan(C, 64, 768, 1, "rcr", copies=80)["axis"] == "n"  # an outer product
    assert _plan(C, 768, 1, 64, "crr", copies=80)["axis"] == "m"


@pytest.mark.parametrize("copies", [1, 3, 100])
@pytest.mark.parametrize(("M", "N", "K"), [(64, 97, 768), (64, 10000, 768), (1, 1, 1), (768, 64, 10000), (3, 5000, 2)])
def test_tiles_cover_the_product(C: ModuleType, M: int, N: int, K: int, copies: int) -> None:
    for layouts in ("rrr", "rcr", "crr"):
        plan = _plan(C, M, N, K, layouts, copies=copies)
        m, n = (N, M) if plan["axis"] == "m" else (M, N)
        assert (plan["tiles_m"] - 1) * plan["tile_m"] < m <= plan["tiles_m"] * plan["tile_m"]
        assert (plan["tiles_n"] - 1) * plan["tile_n"] < n <= plan["tiles_n"] * plan["tile_n"]


def test_one_large_product_is_cut_for_many_threads(C: ModuleType) -> None:
    plan = _plan(C, 64, 10000, 768)
    assert plan["tiles_m"] * plan["tiles_n"] >= 32
    small = _plan(C, 8, 16, 32)
    assert small["tiles_m"] * small["tiles_n"] == 1


def test_scratch_is_aligned_and_reused(C: ModuleType) -> None:
    address = C.scratch_address(1 << 20)
    assert address % 64 == 0
    assert C.scratch_address(100) == address


def test_checks(C: ModuleType) -> None:
    C.check_ndim([2, 3], "(B, G)", 2)
    with pytest.raises(ValueError, match=r"^op: x must be \(B, G\), got \(2,\)$"):
        C.check_ndim([2], "(B, G)", 2)
    C.check_shape([2, 3], "(B, G)", [2, 3])
    with pytest.raises(ValueError, match=r"^op: x must be \(B, G\) = \(2, 4\), got \(2, 3\)$"):
        C.check_shape([2, 3], "(B, G)", [2, 4])
    with pytest.raises(ValueError, match=r"^op: x must be \(\) = \(\), got \(0,\)$"):
        C.check_shape([0], "()", [])
    C.check_classes(12, 3, 4)
    C.check_classes(0, 0, 0)
    for classes in (-1, 13):
        with pytest.raises(ValueError, match=rf"num_classes must be in \[0, G \* J\] = \[0, 12\], got {classes}$"):
            C.check_classes(classes, 3, 4)


def test_no_code_is_shared_between_instruction_sets(C: ModuleType) -> None:
    """An inline function compiled for AVX-512 must not be the copy that the linker keeps for everyone."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not there")
    for name in ("baseline", "avx2", "avx512", "wide"):
        for file in FOLDER.rglob(f"gemm_{name}.cpp.o"):
            lines = subprocess.run(
                ["nm", "-C", str(file)], check=True, capture_output=True, text=True
            ).stdout.splitlines()
            weak = [line for line in lines if line[17:18] in "WVu" and f"mlhead::{name}::" not in line]
            assert lines
            assert not weak, (name, weak)
