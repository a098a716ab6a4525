"""The CUDA kernels of csra_pool on a CPU: csrc/csra_pool.cu compiled with the stand-in for CUDA in tests/cuda_on_cpu.

Indexing, masks, merging and barriers are those of the GPU; timing, memory spaces and the hardware's arithmetic are not.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlhead.testing import check

HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NO_FP64 = np.finfo(np.longdouble).eps >= 1e-18
COMPARED = [
    pytest.param(d, marks=pytest.mark.skipif(NO_FP64, reason="no numbers wider than fp64")) if d == torch.float64 else d
    for d in DTYPES
]
TEMPERATURES = (0.5, 1.0, 5.0, 99.0, math.inf)
LAM = (0.3, 1.0, -0.7, 2.0, 0.4)
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")
INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class CsraScores(ctypes.Structure):
    """As in csrc/csra_pool.h."""

    _fields_ = [
        ("dtype", ctypes.c_int), ("B", INT), ("L", INT), ("N", INT), ("classes", INT), ("first", INT),
        ("average", DOUBLE), ("temperatures", POINTER), ("lam", POINTER),
        ("scores", POINTER), ("s_b", INT), ("s_l", INT), ("scale", POINTER), ("pooled", POINTER), ("pooled_b", INT),
        ("dlogits", POINTER), ("d_b", INT), ("d_c", INT), ("ds", POINTER),
    ]  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """The arguments of the two pooling ops."""

    scores: Tensor
    scale: Tensor | None
    classes: int
    first: int
    dlogits: Tensor
    temperatures: Sequence[float] = TEMPERATURES
    lam: Sequence[float] = LAM
    average: float = 0.8


def make(B: int, L: int, N: int, classes: int, first: int, dtype: torch.dtype, scaled: bool = True) -> Chunk:
    """A chunk of random scores; scales and dlogits of like sizes, so that errors do not hang on a few columns."""
    random = torch.Generator().manual_seed(7 * L + N + first)
    scores = 2 * torch.randn(B, L, N, generator=random, dtype=torch.float64)
    scale = 0.5 + torch.rand(N, generator=random, dtype=torch.float64)
    dlogits = torch.rand(B, classes, generator=random, dtype=torch.float64) - 0.5
    dlogits = dlogits + torch.where(dlogits < 0, -0.5, 0.5)
    return Chunk(scores.to(dtype), scale.to(_sum_dtype(dtype)) if scaled else None, classes, first, dlogits.to(dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "csra_pool.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}"]
    # A vector load off its alignment, which a GPU refuses and a CPU does not, ends the process.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([CXX, *flags, str(HERE / "csra_pool.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    found.csra_pool.restype = found.csra_pool_backward.restype = found.unit_rows_backward.restype = ctypes.c_char_p
    return found


def _struct(chunk: Chunk, scores: Tensor, heads: Tensor) -> CsraScores:
    (B, L, N), (s_b, s_l, _) = scores.shape, scores.stride()
    d_b, d_c = chunk.dlogits.stride()
    return CsraScores(
        dtype=DTYPES.index(scores.dtype), B=B, L=L, N=N, classes=chunk.classes, first=chunk.first,
        average=chunk.average, temperatures=heads[0].data_ptr(), lam=heads[1].data_ptr(), scores=scores.data_ptr(),
        s_b=s_b, s_l=s_l, scale=None if chunk.scale is None else chunk.scale.data_ptr(),
        dlogits=chunk.dlogits.data_ptr(), d_b=d_b, d_c=d_c,
    )  # fmt: skip


def _poisoned(B: int, N: int, dtype: torch.dtype, beside: int) -> Tensor:
    """(B, N) of NaN with `beside` more columns of NaN in memory."""
    return torch.full((B, N + beside), math.nan, dtype=dtype)[:, :N]


def run_like_the_op(library: ctypes.CDLL, chunk: Chunk, beside: int = 0, lead: int = 0) -> dict[str, Tensor]:
    """What csra_pool_cuda.cpp does, forward and backward.

    The scores have `beside` columns of 77 beside them, and start `lead` elements into their memory.
    """
    B, L, N = chunk.scores.shape
    pitch = N + beside
    memory = torch.full((lead + B * L * pitch,), 77.0, dtype=chunk.scores.dtype)
    padded = memory[lead:].view(B, L, pitch)
    scores = padded[:, :, :N]
    scores.copy_(chunk.scores)
    heads = torch.tensor([list(chunk.temperatures), list(chunk.lam)], dtype=torch.float64)
    p = _struct(chunk, scores, heads)

    pooled = _poisoned(B, N, _sum_dtype(scores.dtype), beside)
    p.pooled, p.pooled_b = pooled.data_ptr(), pooled.stride(0)
    problem = library.csra_pool(ctypes.byref(p))
    assert problem is None, problem
    assert torch.equal(scores.nan_to_num(), chunk.scores.nan_to_num()), "forward has written scores"

    results = {"pooled": pooled}
    apart_memory = torch.full_like(memory, 77.0)
    apart = apart_memory[lead:].view(B, L, pitch)
    p.ds = apart[:, :, :N].data_ptr()
    problem = library.csra_pool_backward(ctypes.byref(p))
    assert problem is None, problem
    assert torch.equal(scores.nan_to_num(), chunk.scores.nan_to_num()), "backward has written scores"
    p.ds = scores.data_ptr()
    problem = library.csra_pool_backward(ctypes.byref(p))
    assert problem is None, problem
    assert torch.equal(apart_memory.nan_to_num(), memory.nan_to_num()), "in place and apart differ"
    assert bool((padded[:, :, N:] == 77).all() and (memory[:lead] == 77).all()), "written beside the scores"
    for result in results.values():
        beyond = result.as_strided((B, beside), result.stride(), N) if beside and B else result[:0]
        assert bool(beyond.isnan().all()), "written beside a result"
    return {**results, "scores": scores}


def _columns(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """The temperature, the weight and the class of every column."""
    column = chunk.first + torch.arange(chunk.scores.shape[2])
    h = column // chunk.classes
    heads = torch.tensor([list(chunk.temperatures), list(chunk.lam)], dtype=torch.float64)
    return heads[0, h], heads[1, h], column % chunk.classes


def plain_torch(chunk: Chunk) -> dict[str, Tensor]:
    """The formulas in torch, in the arithmetic of the op."""
    dtype, L = _sum_dtype(chunk.scores.dtype), chunk.scores.shape[1]
    T, lam, c = _columns(chunk)
    hard, finite_T, lam = T.isinf(), torch.where(T.isinf(), 1.0, T).to(dtype), lam.to(dtype)
    scale = torch.ones((), dtype=dtype) if chunk.scale is None else chunk.scale
    s, d = chunk.scores.to(dtype) * scale, chunk.dlogits.to(dtype)[:, None, c]
    p = torch.softmax(finite_T * s, 1)
    A = (p * s).sum(1, keepdim=True)
    maximum, positions = s.amax(1, keepdim=True), torch.arange(L)[:, None]
    first = torch.where(s == maximum, positions, L - 1).amin(1, keepdim=True)
    pooled = chunk.average * s.mean(1) + lam * torch.where(hard, maximum, A)[:, 0]
    slope = torch.where(hard, (positions == first).to(dtype), p * (1 + finite_T * (s - A)))
    ds = d * (chunk.average / L + lam * slope)
    return {"pooled": pooled, "scores": scale * ds}


@np.errstate(invalid="ignore")
def oracle(chunk: Chunk) -> dict[str, Tensor]:
    """The formulas in numpy's widest numbers: fp64 is no oracle for fp64, where T (s_l - A) loses digits at high T."""

    def wide(t: Tensor) -> Any:
        return t.double().numpy().astype(np.longdouble)

    L = chunk.scores.shape[1]
    T, lam, c = _columns(chunk)
    hard, finite_T = T.isinf().numpy(), wide(torch.where(T.isinf(), 1.0, T))
    scale = 1 if chunk.scale is None else wide(chunk.scale)
    s, d = wide(chunk.scores) * scale, wide(chunk.dlogits)[:, None, c.numpy()]
    maximum = s.max(1, keepdims=True)
    e = np.exp(finite_T * (s - maximum))
    p = e / e.sum(1, keepdims=True)
    A = (p * s).sum(1, keepdims=True)
    pooled = chunk.average * s.mean(1) + wide(lam) * np.where(hard, maximum, A)[:, 0]
    one_hot = np.arange(L)[:, None] == s.argmax(1, keepdims=True)  # of the first maximum, by numpy's documentation
    ds = d * (np.longdouble(chunk.average) / L + wide(lam) * np.where(hard, one_hot, p * (1 + finite_T * (s - A))))
    results = {"pooled": pooled, "scores": scale * ds}
    return {name: torch.from_numpy(result.astype(np.float64)) for name, result in results.items()}


def compare(*done: tuple[Chunk, dict[str, Tensor]]) -> None:
    """The budget of mlhead.testing: twice plain torch's error in the same dtype, and one unit of rounding.

    The columns of one temperature are compared together, those of all chunks: a low one must not hide behind the
    errors of a high one, and a handful of numbers says little about plain torch's error.
    """
    parts: dict[tuple[float, str], list[list[Tensor]]] = {}
    for chunk, results in done:
        exact, plain, T = oracle(chunk), plain_torch(chunk), _columns(chunk)[0]
        for name, result in results.items():
            assert result.shape == exact[name].shape
            three = (result, exact[name], plain[name].to(result.dtype))
            for temperature in T.unique().tolist():
                part = [t[..., temperature == T].flatten() for t in three]
                parts.setdefault((temperature, name), []).append(part)
    for (temperature, name), triples in parts.items():
        check(f"{name} at T = {temperature:g}", *(torch.cat(column) for column in zip(*triples, strict=True)))


def firsts(N: int, classes: int) -> set[int]:
    """Where chunks of N columns begin, so that together they see all five heads."""
    return set(range(5)) if N == 1 else {classes // 2, 5 * classes - N}


@pytest.mark.parametrize("L", [1, 2, 7, 49, 63, 64, 65, 196])
@pytest.mark.parametrize("dtype", COMPARED, ids=str)
def test_values_and_gradients(library: ctypes.CDLL, dtype: torch.dtype, L: int) -> None:
    done = []
    for N in (1, 5, 31, 32, 33, 70):
        classes = -(-N // 4)
        for i, first in enumerate(sorted(firsts(N, classes))):
            chunk = make(2, L, N, classes, first, dtype, scaled=(i + N) % 3 > 0)
            done.append((chunk, run_like_the_op(library, chunk)))
    compare(*done)


@pytest.mark.parametrize("dtype", COMPARED, ids=str)
@pytest.mark.parametrize("beside", [0, 1, 2, 3])
@pytest.mark.parametrize("lead", [0, 1])
def test_scores_and_results_with_gaps_and_off_alignment(
    library: ctypes.CDLL, dtype: torch.dtype, beside: int, lead: int
) -> None:
    """16-bit scores that can be read in pairs, and those that cannot: an odd start, stride or number of columns."""
    chunks = [make(2, 19, N, 17, first, dtype) for N, first in ((32, 53), (66, 6), (67, 6))]
    compare(*((chunk, run_like_the_op(library, chunk, beside=beside, lead=lead)) for chunk in chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dlogits_in_any_strides(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    chunk = make(3, 10, 70, 17, 6, dtype)
    constant = torch.full((), 0.5, dtype=dtype)
    for dlogits in (
        constant.expand(3, 17),  # out.sum().backward()
        chunk.dlogits[:, :1].expand(3, 17),
        chunk.dlogits[:1].expand(3, 17),
        chunk.dlogits.t().contiguous().t(),
        chunk.dlogits.repeat(1, 3)[:, ::3],
    ):
        strided = replace(chunk, dlogits=dlogits)
        compare((strided, run_like_the_op(library, strided)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_first_maximum(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Without the average, every other position's gradient is exactly 0, so a second winner cannot hide."""
    for L in (2, 9, 64):
        chunk = make(3, L, 40, 40, 0, dtype, scaled=False)
        levels = torch.randint(0, 3, chunk.scores.shape, generator=torch.Generator().manual_seed(L)).to(dtype)
        levels[0] = -1  # all alike
        levels[1, :, 0] = -math.inf
        chunk = replace(chunk, scores=levels, temperatures=(math.inf,), lam=(1.0,), average=0.0)
        results = run_like_the_op(library, chunk)
        gradient = results["scores"]
        assert torch.equal(gradient, oracle(chunk)["scores"].to(dtype))
        assert bool((gradient != 0).sum(1).eq(1).all())
        assert torch.equal(gradient[0, 0], chunk.dlogits[0])


@pytest.mark.parametrize("position", [0, 5, 8, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_its_own_column_only(library: ctypes.CDLL, dtype: torch.dtype, position: int) -> None:
    chunk = make(2, 41, 70, 14, 0, dtype)
    poisoned = torch.zeros(2, 70, dtype=torch.bool)
    poisoned[0, ::5] = True  # some columns of every head
    scores = chunk.scores.clone()
    scores[:, position][poisoned] = math.nan
    for average in (0.8, 0.0):
        broken = replace(chunk, scores=scores, average=average)
        results, whole = run_like_the_op(library, broken), run_like_the_op(library, replace(chunk, average=average))
        assert torch.equal(results["pooled"].isnan(), poisoned)
        assert bool(results["scores"].isnan().any(1)[poisoned[:, :56].nonzero(as_tuple=True)].all())  # a finite T
        assert torch.equal(results["pooled"][~poisoned], whole["pooled"][~poisoned])
        assert torch.equal(results["scores"].mT[~poisoned], whole["scores"].mT[~poisoned])


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinite_scores_as_in_torch(library: ctypes.CDLL, infinity: float) -> None:
    chunk = make(2, 20, 70, 14, 0, torch.float32)
    chunk.scores[0, 3, ::3] = infinity
    pooled, exact = run_like_the_op(library, chunk)["pooled"], oracle(chunk)["pooled"]
    odd = ~exact.isfinite()
    assert bool(odd.any())
    torch.testing.assert_close(pooled[odd], exact[odd].float(), equal_nan=True)
    assert bool(pooled[~odd].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_heads_than_one_launch_takes(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    for classes, first, N in ((1, 2, 70), (2, 3, 140)):
        temperatures = [TEMPERATURES[h * h % 13 % 5] for h in range(75)]
        chunk = make(2, 9, N, classes, first, dtype)
        chunk = replace(chunk, temperatures=temperatures, lam=[1 - h / 50 for h in range(75)])
        compare((chunk, run_like_the_op(library, chunk)))


def test_large_scores_and_extreme_temperatures(library: ctypes.CDLL) -> None:
    chunk = make(3, 50, 64, 16, 0, torch.float32)
    scores, temperatures = 1e4 * chunk.scores, (1e-3, 1e6, math.inf, 1.0)
    chunk = replace(chunk, scores=scores, temperatures=temperatures, lam=(1.0,) * 4)
    compare((chunk, run_like_the_op(library, chunk)))


def test_nothing_to_do_and_too_much(library: ctypes.CDLL) -> None:
    for B, N in ((0, 40), (2, 0)):
        run_like_the_op(library, make(B, 5, N, 17, 6, torch.float32))
    chunk, heads = make(1, 1, 1, 1, 0, torch.float32), torch.ones(2, 5, dtype=torch.float64)
    long = _struct(chunk, chunk.scores.expand(1, (1 << 30) + 1, 1), heads)
    assert b"2^30 positions" in library.csra_pool(ctypes.byref(long))
    wide = _struct(chunk, chunk.scores.expand((1 << 31), 1, 1), heads)
    assert b"2^31 - 1 blocks" in library.csra_pool(ctypes.byref(wide))


class UnitRows(ctypes.Structure):
    """As in csrc/csra_pool.h."""

    _fields_ = [
        ("dtype", ctypes.c_int), ("dw_accumulated", ctypes.c_bool), ("divide", ctypes.c_bool), ("N", INT), ("D", INT),
        ("dw", POINTER), ("dw_n", INT), ("weight", POINTER), ("w_n", INT), ("w_d", INT), ("norm", POINTER),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_the_gradient_through_the_norm(
    library: ctypes.CDLL, dtype: torch.dtype, accumulated: bool, divide: bool
) -> None:
    for N, D in ((1, 1), (3, 5), (5, 255), (4, 257), (2, 2048)):
        weight = torch.randn(D, N).to(dtype).t() if N == 3 else torch.randn(N, D).to(dtype)
        norm = weight.to(_sum_dtype(dtype)).norm(dim=1)
        dw = torch.randn(N, D).to(_sum_dtype(dtype) if accumulated else dtype)
        u = weight.double() / norm.double()[:, None]
        exact = dw.double() - u * (dw.double() * u).sum(1, keepdim=True)
        exact = exact / norm.double()[:, None] if divide else exact
        p = UnitRows(DTYPES.index(dtype), accumulated, divide, N, D, dw.data_ptr(), dw.stride(0), weight.data_ptr())
        p.w_n, p.w_d, p.norm = weight.stride(0), weight.stride(1), norm.data_ptr()
        assert library.unit_rows_backward(ctypes.byref(p)) is None
        # One rounding on the way out, and the sum's own.
        size = exact.abs().max() + (1 / norm.double().min() if divide else 1)
        unit = torch.finfo(dw.dtype).eps + 8 * torch.finfo(_sum_dtype(dtype)).eps
        assert (dw.double() - exact).abs().max() <= unit * size
