"""The CUDA kernels of dropout_add_layer_norm and relu_dropout on a CPU, with the stand-in of tests/cuda_on_cpu.

Indexing, masks, dropout, sums and barriers are those of the GPU; timing, memory spaces and the hardware's arithmetic
are not.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from op_matrix import CASES, LAYOUTS
from torch import Tensor

from mlhead.reference._dropout import keep_mask
from mlhead.testing import Sample, check, oracle, plain_torch

HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")
INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
NAMES = ("x", "residual", "weight", "bias")


class Operand(ctypes.Structure):
    """LayerNormOperand and ReluOperand, as in their headers."""

    _fields_ = [("data", POINTER), ("b", INT), ("n", INT), ("e", INT)]


class LayerNormCall(ctypes.Structure):
    """As in csrc/dropout_add_layer_norm.h."""

    _fields_ = [
        ("dtype", ctypes.c_int), ("parameters_accumulated", ctypes.c_bool),
        ("B", INT), ("N", INT), ("E", INT), ("x", Operand), ("residual", Operand), ("dout", Operand),
        ("weight", POINTER), ("bias", POINTER), ("weight_e", INT), ("bias_e", INT),
        ("seed", POINTER), ("dropout_p", DOUBLE), ("eps", DOUBLE), ("statistics", POINTER), ("out", POINTER),
        ("dx", POINTER), ("dresidual", POINTER), ("dweight", POINTER), ("dbias", POINTER),
    ]  # fmt: skip


class ReluCall(ctypes.Structure):
    """As in csrc/relu_dropout.h."""

    _fields_ = [
        ("dtype", ctypes.c_int), ("B", INT), ("N", INT), ("F", INT),
        ("x", Operand), ("dout", Operand), ("out", Operand),
        ("seed", POINTER), ("dropout_p", DOUBLE), ("result", POINTER),
    ]  # fmt: skip


def _compiled(folder: Path, *defines: str) -> ctypes.CDLL:
    path = folder / "rows.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}", *defines]
    # A vector load off its alignment, which a GPU refuses and a CPU does not, ends the process.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([CXX, *flags, str(HERE / "rows.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def norm(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = _compiled(tmp_path_factory.mktemp("norm"))
    found.norm_forward.restype = found.norm_backward.restype = ctypes.c_char_p
    found.norm_workspace.restype = INT
    return found


@pytest.fixture(scope="session")
def relu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = _compiled(tmp_path_factory.mktemp("relu"), "-DMLHEAD_RELU_DROPOUT")
    found.relu_forward.restype = found.relu_backward.restype = ctypes.c_char_p
    return found


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(tensor: Tensor) -> Operand:
    return Operand(tensor.data_ptr(), *tensor.stride())


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def _ok(problem: bytes | None) -> None:
    assert problem is None, problem


def run_norm(library: ctypes.CDLL, sample: Sample, needs: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """What dropout_add_layer_norm_cuda.cpp does: forward, and the gradients of `needs`."""
    x, residual, weight, bias = (t for t in sample.tensors.values() if t is not None)
    (B, N, E), wide = x.shape, _sum_dtype(x.dtype)
    dropout_p, seed = sample.options["dropout_p"], torch.tensor(sample.options["seed"])
    statistics, out = _poisoned(2, B, N, dtype=wide), _poisoned(B, N, E, dtype=x.dtype)
    p = LayerNormCall(
        dtype=DTYPES.index(x.dtype), parameters_accumulated=weight.dtype == wide, B=B, N=N, E=E,
        x=_operand(x), residual=_operand(residual), dout=_operand(sample.dout),
        weight=weight.data_ptr(), bias=bias.data_ptr(), weight_e=weight.stride(0), bias_e=bias.stride(0),
        seed=seed.data_ptr() if dropout_p > 0 else None, dropout_p=dropout_p, eps=sample.options["eps"],
        statistics=statistics.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    _ok(library.norm_forward(ctypes.byref(p)))
    results = {"out": out}
    for name in needs:
        tensor = sample.tensors[name]
        assert tensor is not None
        results[name] = _poisoned(*tensor.shape, dtype=tensor.dtype)
        setattr(p, f"d{name}", results[name].data_ptr())
    workspace = _poisoned(library.norm_workspace(ctypes.byref(p)), dtype=wide)
    assert workspace.numel() % E == 0
    _ok(library.norm_backward(ctypes.byref(p), POINTER(workspace.data_ptr())))
    return results


def run_relu(library: ctypes.CDLL, sample: Sample) -> dict[str, Tensor]:
    """What relu_dropout_cuda.cpp does, forward and backward."""
    x = sample.tensors["x"]
    assert x is not None
    dropout_p, seed = sample.options["dropout_p"], torch.tensor(sample.options["seed"])
    out, dx = (_poisoned(*x.shape, dtype=x.dtype) for _ in range(2))
    B, N, F = x.shape
    p = ReluCall(dtype=DTYPES.index(x.dtype), B=B, N=N, F=F, x=_operand(x), dropout_p=dropout_p)
    p.seed, p.result = seed.data_ptr() if dropout_p > 0 else None, out.data_ptr()
    _ok(library.relu_forward(ctypes.byref(p)))
    p.seed, p.dout, p.out, p.result = None, _operand(sample.dout), _operand(out), dx.data_ptr()
    _ok(library.relu_backward(ctypes.byref(p)))
    return {"out": out, "x": dx}


def compare(results: dict[str, Tensor], sample: Sample) -> None:
    exact, plain = oracle(sample), plain_torch(sample)
    for name, result in results.items():
        check(name, result, exact[name], plain[name].to(result.dtype))


def make(op: str, dtype: torch.dtype, *sizes: int, seed: int = 0, **options: Any) -> Sample:
    letters = "BNF" if op == "relu_dropout" else "BNE"
    return CASES[op].make({**dict(zip(letters, sizes, strict=True)), **options}, dtype, "cpu", seed)


def make_norm(dtype: torch.dtype, *sizes: int, **options: Any) -> Sample:
    return make("dropout_add_layer_norm", dtype, *sizes, **options)


def make_relu(dtype: torch.dtype, *sizes: int, **options: Any) -> Sample:
    return make("relu_dropout", dtype, *sizes, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1, 7, 33, 96, 264])
def test_norm_of_any_width(norm: ctypes.CDLL, dtype: torch.dtype, E: int) -> None:
    sample = make_norm(dtype, 2, 3, E, dropout=0.3)
    compare(run_norm(norm, sample), sample)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1032, 1041, 2051, 4104])
def test_norm_of_rows_for_a_block(norm: ctypes.CDLL, dtype: torch.dtype, E: int) -> None:
    """Vectors and single numbers, and more than the registers of a block hold."""
    sample = make_norm(dtype, 1, 2, E, dropout=0.3)
    compare(run_norm(norm, sample), sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_in_several_runs(norm: ctypes.CDLL, dtype: torch.dtype) -> None:
    sample = make_norm(dtype, 3, 7, 40, dropout=0.1)
    first, second = run_norm(norm, sample), run_norm(norm, sample)
    compare(first, sample)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [40, 41])
def test_norm_with_wide_parameters(norm: ctypes.CDLL, dtype: torch.dtype, E: int) -> None:
    sample = make_norm(dtype, 2, 4, E, dropout=0.5, wide=True)
    assert sample.tensors["weight"].dtype == torch.float32  # type: ignore[union-attr]
    compare(run_norm(norm, sample), sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norm_layouts(norm: ctypes.CDLL, dtype: torch.dtype, layout: str) -> None:
    sample = make_norm(dtype, 2, 3, 16, dropout=0.3).map(LAYOUTS[layout])
    compare(run_norm(norm, sample), sample)


@pytest.mark.parametrize("which", ["x", "residual", "weight", "bias", "dout", "queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_with_strides_of_0(norm: ctypes.CDLL, dtype: torch.dtype, which: str) -> None:
    """One operand without strides beside vectorised ones; queries that all images share, which are both inputs."""
    sample = make_norm(dtype, 3, 2, 16, dropout=0.3)
    constant = torch.full((), 0.5, dtype=dtype)
    if which == "dout":
        sample = replace(sample, dout=constant.expand(sample.dout.shape))
    elif which == "queries":
        queries = sample.tensors["x"][:1].expand(3, 2, 16)  # type: ignore[index]
        sample = replace(sample, tensors={**sample.tensors, "x": queries, "residual": queries})
    else:
        shape = sample.tensors[which].shape  # type: ignore[union-attr]
        sample = replace(sample, tensors={**sample.tensors, which: constant.expand(shape)})
    compare(run_norm(norm, sample), sample)


@pytest.mark.parametrize("needs", [(name,) for name in NAMES] + [("x", "bias"), ()], ids=str)
@pytest.mark.parametrize("E", [24, 2056])
def test_norm_each_gradient_alone(norm: ctypes.CDLL, needs: tuple[str, ...], E: int) -> None:
    """Also of rows that are too long for the registers, in fp64."""
    sample = make_norm(torch.float64, 1, 2, E, dropout=0.3)
    compare(run_norm(norm, sample, needs), sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_of_numbers_far_from_0(norm: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A variance from sums of squares would lose its digits. Not in fp64, where the oracle's own mean is no better."""
    for E in (64, 1032):
        sample = make_norm(dtype, 1, 2, E)
        residual = 100 + sample.tensors["residual"]  # type: ignore[operator]
        sample = replace(sample, tensors={**sample.tensors, "residual": residual})
        compare(run_norm(norm, sample), sample)


def test_norm_without_rows(norm: ctypes.CDLL) -> None:
    for B, N in ((0, 3), (2, 0)):
        results = run_norm(norm, make_norm(torch.bfloat16, B, N, 40, dropout=0.3))
        for name in ("weight", "bias"):
            assert torch.equal(results[name], torch.zeros(40, dtype=torch.bfloat16))


@pytest.mark.parametrize("E", [40, 1032])
def test_norm_keeps_nan_to_its_row(norm: ctypes.CDLL, E: int) -> None:
    sample = make_norm(torch.float32, 2, 2, E, dropout=0.5)
    x = sample.tensors["x"]
    assert x is not None
    x[0, 1] = math.nan  # some of them dropped
    results, expected = run_norm(norm, sample), sample.run("reference")
    for name, want in expected.items():
        assert torch.equal(results[name].isnan(), want.isnan()), name


@pytest.mark.parametrize("seed", [11, -1, 2**40 + 3])
@pytest.mark.parametrize("E", [40, 67, 1032])
def test_norm_drops_what_the_reference_drops(norm: ctypes.CDLL, seed: int, E: int) -> None:
    """The gradient of x is exactly 0 where x was dropped, and that of the residual is not."""
    sample = make_norm(torch.float32, 2, 2, E, dropout=0.4)
    sample = replace(sample, options={**sample.options, "seed": seed})
    results = run_norm(norm, sample, ("x", "residual"))
    kept = keep_mask(torch.tensor(seed), 0.4, 2, 1, 2, E).squeeze(1)
    assert torch.equal(results["x"] != 0, kept & (results["residual"] != 0))
    torch.testing.assert_close(results["x"][kept], (results["residual"] / 0.6)[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 7), (3, 5, 64), (2, 9, 517), (0, 3, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_relu(relu: ctypes.CDLL, dtype: torch.dtype, sizes: tuple[int, ...], dropout: float) -> None:
    sample = make_relu(dtype, *sizes, dropout=dropout)
    compare(run_relu(relu, sample), sample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "dout", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_relu_layouts(relu: ctypes.CDLL, dtype: torch.dtype, where: str, layout: str) -> None:
    for F in (16, 21):
        sample, change = make_relu(dtype, 2, 3, F, dropout=0.3), LAYOUTS[layout]
        if where != "dout":
            sample = replace(sample, tensors={"x": change(sample.tensors["x"])})  # type: ignore[arg-type]
        if where != "x":
            sample = replace(sample, dout=change(sample.dout))
        compare(run_relu(relu, sample), sample)


@pytest.mark.parametrize("seed", [11, -1, 2**40 + 3])
def test_relu_drops_what_the_reference_drops(relu: ctypes.CDLL, seed: int) -> None:
    for F in (64, 67):
        sample = make_relu(torch.bfloat16, 3, 5, F, dropout=0.4)
        x = torch.ones(3, 5, F, dtype=torch.bfloat16)
        sample = replace(sample, tensors={"x": x}, options={**sample.options, "seed": seed})
        kept = keep_mask(torch.tensor(seed), 0.4, 3, 1, 5, F).squeeze(1)
        assert torch.equal(run_relu(relu, sample)["out"], kept.to(x.dtype) / 0.6)


def test_relu_of_what_is_not_finite(relu: ctypes.CDLL) -> None:
    sample = make_relu(torch.float32, 1, 2, 8)
    x = sample.tensors["x"]
    assert x is not None
    x[0, :, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    results = run_relu(relu, sample)
    assert bool(results["out"][0, :, 0].isnan().all() and (results["out"][0, :, 1] == math.inf).all())
    assert torch.equal(results["x"][0, :, :2], sample.dout[0, :, :2])
    assert bool((results["out"][0, :, 2] == 0).all() and (results["x"][0, :, 2] == 0).all())


def test_too_much_for_a_grid(norm: ctypes.CDLL, relu: ctypes.CDLL) -> None:
    one = torch.ones(1)
    operand = Operand(one.data_ptr(), 0, 0, 0)
    p = LayerNormCall(B=1 << 20, N=1 << 20, E=5000, x=operand, residual=operand)
    assert b"2^31 - 1 blocks" in norm.norm_forward(ctypes.byref(p))
    q = ReluCall(B=1 << 20, N=1 << 20, F=1 << 10, x=operand)
    assert b"2^31 - 1 blocks" in relu.relu_forward(ctypes.byref(q))
