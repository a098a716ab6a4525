"""The CUDA kernels of the losses on a CPU, with the stand-in of tests/cuda_on_cpu.

Indexing, the search for sparse targets, sums, splits and barriers are those of the GPU; timing, memory spaces and the
hardware's arithmetic are not.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from loss_blocks import BLOCKS, LOSSES, TARGETS, Block, Problem, expect
from torch import Tensor

HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TARGET_TYPES = (torch.int8, *DTYPES)
KINDS = ("bce", "asl", "softmax")
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")
INT, DOUBLE, POINTER, ENUM, BOOL = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int, ctypes.c_bool


class LossBlock(ctypes.Structure):
    """As in csrc/class_loss.h."""

    _fields_ = [
        ("dtype", ENUM), ("G", INT), ("B", INT), ("N", INT), ("first", INT), ("group_classes", INT),
        ("num_classes", INT), ("z", POINTER), ("z_g", INT), ("z_b", INT), ("bias", POINTER), ("bias_dtype", ENUM),
        ("bias_c", INT), ("target", ENUM), ("targets", POINTER), ("t_b", INT), ("t_c", INT), ("offsets", POINTER),
        ("values", POINTER), ("class_weight", POINTER), ("pos_weight", POINTER), ("sample_weight", POINTER),
        ("sample_b", INT), ("loss", ENUM), ("gamma_neg", DOUBLE), ("gamma_pos", DOUBLE), ("margin", DOUBLE),
        ("eps", DOUBLE), ("detach_focal", BOOL), ("label_smoothing", DOUBLE), ("factor", DOUBLE), ("dout", POINTER),
        ("row_loss", POINTER), ("statistics", POINTER), ("need_dz", BOOL), ("splits", INT), ("parts", POINTER),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("loss") / "loss.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}"]
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([CXX, *flags, str(HERE / "loss.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    found.loss_gradient.restype = found.loss_statistics.restype = found.scale_by.restype = ctypes.c_char_p
    found.splits_of.restype = INT
    return found


def _ok(problem: bytes | None) -> None:
    assert problem is None, problem


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run(library: ctypes.CDLL, problem: Problem, multiprocessors: int = 0, need_dz: bool = True) -> dict[str, Tensor]:
    """What class_loss_cuda.cpp does; without multiprocessors rows are not split."""
    a, z, place = problem.arguments, problem.z, problem.place
    target = torch.int8 if a.targets.dtype in (torch.bool, torch.uint8) else a.targets.dtype
    dense = a.offsets is None
    p = LossBlock(
        dtype=DTYPES.index(z.dtype), G=z.shape[0], B=z.shape[1], N=z.shape[2], **place._asdict(), z=_at(z),
        z_g=z.stride(0), z_b=z.stride(1), bias=_at(problem.bias), target=TARGET_TYPES.index(target) if dense else 0,
        targets=_at(a.targets), offsets=_at(a.offsets), values=_at(a.values), class_weight=_at(a.class_weight),
        pos_weight=_at(a.pos_weight), sample_weight=_at(a.sample_weight), loss=KINDS.index(a.loss),
        gamma_neg=a.gamma_neg, gamma_pos=a.gamma_pos, margin=a.margin, eps=a.eps, detach_focal=a.detach_focal,
        label_smoothing=a.label_smoothing, factor=problem.factor, dout=_at(problem.dout), need_dz=need_dz, splits=1,
    )  # fmt: skip
    if problem.bias is not None:
        p.bias_dtype, p.bias_c = DTYPES.index(problem.bias.dtype), problem.bias.stride(0)
    if a.sample_weight is not None:
        p.sample_b = a.sample_weight.stride(0)
    if dense:
        p.t_b, p.t_c = a.targets.stride()
    p.splits = library.splits_of(ctypes.byref(p), multiprocessors)
    numbers = z.shape[1] * p.splits * (4 if a.loss == "softmax" else 1)
    parts = torch.full((numbers,), math.nan, dtype=problem.row_loss.dtype)
    p.parts = _at(parts) if p.splits > 1 else None
    if a.loss == "softmax":
        p.statistics = _at(problem.statistics)
        _ok(library.loss_statistics(ctypes.byref(p)))
        p.parts = None
        _ok(library.loss_gradient(ctypes.byref(p)))
        return {"dz": z, "statistics": problem.statistics}
    p.row_loss = _at(problem.row_loss)
    _ok(library.loss_gradient(ctypes.byref(p)))
    return {"dz": z, "row_loss": problem.row_loss}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_loss(library: ctypes.CDLL, loss: str, targets: str, dtype: torch.dtype) -> None:
    problem = Problem(Block(1, 2, 83), dtype, loss, targets, "cpu", everything=True)
    expect(problem, run(library, problem.copy()))


@pytest.mark.parametrize("splits", [False, True], ids=["one block", "splits"])
@pytest.mark.parametrize("targets", ["int8", "sparse"])
@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block(library: ctypes.CDLL, block: Block, loss: str, targets: str, splits: bool) -> None:
    problem = Problem(block, torch.float32, loss, targets, "cpu")
    expect(problem, run(library, problem.copy(), 100 if splits else 0))


@pytest.mark.parametrize("targets", ["int8", "sparse"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan(library: ctypes.CDLL, loss: str, targets: str) -> None:
    """A NaN makes its own loss and gradient NaN, and in a softmax those of its row."""
    problem = Problem(Block(1, 3, 83), torch.float32, loss, targets, "cpu")
    dirty, counts = problem.copy(), bool(problem.dense()[1, 40] >= 0)
    dirty.z[0, 1, 40] = math.nan
    results = run(library, dirty)
    expected = torch.zeros_like(dirty.z, dtype=torch.bool)
    if problem.arguments.loss == "softmax":
        expected[:, 1] = True
        lse = results["statistics"][:, 0] + results["statistics"][:, 1].log()
        assert lse.isnan().tolist() == [False, True, False]
    else:
        expected[0, 1, 40] = counts
        assert results["row_loss"].isnan().tolist() == [False, counts, False]
    assert torch.equal(results["dz"].isnan(), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(library: ctypes.CDLL, loss: str) -> None:
    problem = Problem(Block(1, 3, 83), torch.float32, loss, "int8", "cpu")
    problem.z *= 40
    expect(problem, run(library, problem.copy()))


@pytest.mark.parametrize("loss", ["bce", "asl"])
def test_the_loss_alone(library: ctypes.CDLL, loss: str) -> None:
    problem = Problem(Block(2, 3, 50), torch.float32, loss, "int8", "cpu")
    alone, both = problem.copy(), run(library, problem.copy())
    results = run(library, alone, need_dz=False)
    assert torch.equal(alone.z, problem.z)
    assert torch.equal(results["row_loss"], both["row_loss"])


@pytest.mark.parametrize("factor", [0.25, 1.0, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(library: ctypes.CDLL, dtype: torch.dtype, factor: float) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scalar, x = torch.tensor(factor, dtype=wide), torch.randn(2001).to(dtype)
    expected = x * scalar.to(dtype)
    expected[-1] = x[-1]  # one more than is asked for
    _ok(library.scale_by(DTYPES.index(dtype), POINTER(_at(x)), INT(2000), POINTER(_at(scalar)), 1))
    torch.testing.assert_close(x, expected, equal_nan=True)


def test_nothing(library: ctypes.CDLL) -> None:
    for shape in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        problem = Problem(Block(*shape, num_classes=10), torch.float32, "bce", "int8", "cpu")
        assert torch.equal(run(library, problem.copy())["row_loss"], problem.row_loss)


def test_too_much_for_a_grid(library: ctypes.CDLL) -> None:
    p = LossBlock(G=1, B=1 << 31, N=1, num_classes=1, eps=1.0, splits=1, need_dz=True)
    assert b"2^31 - 1 blocks" in library.loss_gradient(ctypes.byref(p))
