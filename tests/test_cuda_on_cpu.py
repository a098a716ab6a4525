"""The CUDA kernels' logic on a CPU: csrc/group_fc.cu compiled with the stand-in for CUDA in tests/cuda_on_cpu.

Indexing, masks, splits and barriers are those of the GPU; timing, memory spaces and the hardware's arithmetic are not.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from op_matrix import CASES, LAYOUTS
from torch import Tensor

from mlhead.testing import Sample, check, oracle, plain_torch

HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")
NAMES = "product dtype groups M N K J C a a_g a_m a_k b b_g b_k b_n c c_g c_m bias bias_c"


class GroupedProduct(ctypes.Structure):
    """As in csrc/group_fc.h."""

    _fields_ = [
        (name, ctypes.c_int if i < 2 else ctypes.c_void_p if name in ("a", "b", "c", "bias") else ctypes.c_int64)
        for i, name in enumerate(NAMES.split())
    ]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "group_fc.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}"]
    subprocess.run([CXX, *flags, str(HERE / "group_fc.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    found.grouped_product.restype = found.column_sum.restype = ctypes.c_char_p
    found.parts_of.restype = ctypes.c_int64
    return found


def _run(library: ctypes.CDLL, parts: int | None, **fields: Any) -> None:
    pointers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items()}
    p = GroupedProduct(**pointers)
    # The GPU asks for as many parts as fill it; here a small imaginary one, or a number that the test gives.
    parts = library.parts_of(ctypes.byref(p), 4) if parts is None else parts
    workspace = torch.full((parts, p.groups, p.M, p.N), float("nan"), dtype=_sum_dtype(fields["c"].dtype))
    problem = library.grouped_product(ctypes.byref(p), ctypes.c_int64(parts), ctypes.c_void_p(workspace.data_ptr()))
    assert problem is None, problem


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_like_the_op(library: ctypes.CDLL, sample: Sample, parts: int | None = None) -> dict[str, Tensor]:
    """What group_fc_cuda.cpp does: forward, and all gradients."""
    h, weight, bias = (sample.tensors[name] for name in ("h", "weight", "bias"))
    assert h is not None
    assert weight is not None
    d, C = sample.dout, sample.options["num_classes"]
    (B, G, E), J, dtype = h.shape, weight.shape[2], DTYPES.index(h.dtype)
    nan = float("nan")
    logits, dh = h.new_full((B, C), nan), h.new_full((B, G, E), nan)
    dweight, dbias = h.new_full((G, E, J), nan), h.new_full((C,), nan)
    common = {"dtype": dtype, "J": J, "C": C}
    hs, ws, ds = h.stride(), weight.stride(), d.stride()
    if B and C:
        _run(
            library, parts=1, product=0, **common, groups=-(-C // J), M=B, N=J, K=E,
            a=h, a_g=hs[1], a_m=hs[0], a_k=hs[2],
            b=weight, b_g=ws[0], b_k=ws[1], b_n=ws[2], c=logits, c_g=J, c_m=C,
            bias=bias, bias_c=0 if bias is None else bias.stride(0),
        )  # fmt: skip
    _run(
        library, parts, product=1, **common, groups=G, M=B, N=E, K=J, a=d, a_g=J * ds[1], a_m=ds[0], a_k=ds[1],
        b=weight, b_g=ws[0], b_k=ws[2], b_n=ws[1], c=dh, c_g=E, c_m=G * E,
    )  # fmt: skip
    _run(
        library, parts, product=2, **common, groups=G, M=E, N=J, K=B, a=h, a_g=hs[1], a_m=hs[2], a_k=hs[0],
        b=d, b_g=J * ds[1], b_k=ds[0], b_n=ds[1], c=dweight, c_g=E * J, c_m=J,
    )  # fmt: skip
    as_int64 = [ctypes.c_int64(n) for n in (B, C, *ds)]
    library.column_sum(dtype, ctypes.c_void_p(d.data_ptr()), *as_int64, ctypes.c_void_p(dbias.data_ptr()))
    results = {"out": logits, "h": dh, "weight": dweight, "bias": dbias}
    return {name: t for name, t in results.items() if name != "bias" or bias is not None}


def _compare(library: ctypes.CDLL, sample: Sample, parts: int | None = None) -> None:
    results, exact, plain = run_like_the_op(library, sample, parts), oracle(sample), plain_torch(sample)
    for name, result in results.items():
        check(name, result, exact[name], plain[name].to(result.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    case = CASES["group_fc"]
    wide = {"B": 24, "G": 2, "E": 72, "C": 144}  # rows of 16-byte multiples: vector loads, full and partial tiles
    for dims in (*case.shapes, wide, {**wide, "B": 70, "E": 40}):
        try:
            _compare(library, case.make(dims, dtype, "cpu", 0))
        except AssertionError as error:
            raise AssertionError(f"{dict(dims)}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_split_sums(library: ctypes.CDLL, dtype: torch.dtype, parts: int) -> None:
    _compare(library, CASES["group_fc"].make({"B": 130, "G": 2, "E": 24, "C": 350}, dtype, "cpu", 1), parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(library: ctypes.CDLL, dtype: torch.dtype, layout: str) -> None:
    sample = CASES["group_fc"].make({"B": 9, "G": 3, "E": 40, "C": 70}, dtype, "cpu", 2)
    _compare(library, sample.map(LAYOUTS[layout]))


@pytest.mark.parametrize("which", ["h", "weight", "dout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_operand_without_strides_beside_a_vectorised_one(
    library: ctypes.CDLL, dtype: torch.dtype, which: str
) -> None:
    """Sizes that vector loads take, and one operand that has stride 0 along every axis: `out.sum().backward()`."""
    sample = CASES["group_fc"].make({"B": 16, "G": 2, "E": 64, "C": 128}, dtype, "cpu", 3)
    constant = torch.full((), 0.5, dtype=dtype)
    if which == "dout":
        sample = Sample(sample.function, sample.tensors, sample.options, constant.expand(sample.dout.shape))
    else:
        tensors = {**sample.tensors, which: constant.expand(sample.tensors[which].shape)}  # type: ignore[union-attr]
        sample = Sample(sample.function, tensors, sample.options, sample.dout)
    _compare(library, sample)


def test_parts_cover_the_sum_and_none_is_empty(library: ctypes.CDLL) -> None:
    for steps in (1, 7, 8, 9, 16, 31, 100, 333, 5000):
        p = GroupedProduct(product=1, dtype=0, groups=1, M=4, N=4, K=16 * steps - 3, J=16 * steps - 3)
        parts = library.parts_of(ctypes.byref(p), 132)
        part = -(-steps // parts)
        assert 1 <= parts <= 32
        assert (parts - 1) * part < steps <= parts * part
        assert parts == 1 or part >= 8
