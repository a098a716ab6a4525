"""The Triton kernels of the losses against plain torch in fp64, over blocks as the engine cuts them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_blocks import BLOCKS, LOSSES, TARGETS, Block, Problem, expect
from torch import Tensor

from mlhead import _backend

pytest.importorskip("triton")

from mlhead.kernels import _class_loss as shared
from mlhead.kernels import class_loss as kernels
from mlhead.kernels._device import H100, Device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs
REFUSAL = _backend._refusal("group_fc", _backend.implementations("group_fc"), "triton", DEVICE, torch.float32)
needs_triton = pytest.mark.skipif(REFUSAL is not None, reason=f"{REFUSAL}")
SMALL = Device(capability=90, multiprocessors=1, shared_bytes=0)


def run(problem: Problem, need_dz: bool = True) -> dict[str, Tensor]:
    """What the launchers make of a problem."""
    p, a, place = problem, problem.arguments, problem.place
    data = (a.targets, a.offsets, a.values)
    results: dict[str, Tensor] = {"dz": p.z}
    row_loss, statistics = None, None
    if a.loss == "softmax":
        statistics = results["statistics"] = p.statistics
        kernels.softmax_statistics(p.z, p.bias, *place, *data, a.class_weight, a.label_smoothing, statistics)
    else:
        row_loss = results["row_loss"] = p.row_loss
    kernels.gradient(
        p.z, p.bias, *place, *data, a.class_weight, a.pos_weight, a.sample_weight, a.loss, a.gamma_neg, a.gamma_pos,
        a.margin, a.eps, a.detach_focal, a.label_smoothing, p.factor, p.dout, row_loss, statistics, need_dz,
    )  # fmt: skip
    return results


@needs_triton
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_loss(loss: str, targets: str, dtype: torch.dtype) -> None:
    problem = Problem(Block(1, 3, 83), dtype, loss, targets, DEVICE, everything=True)
    expect(problem, run(problem.copy()))


@needs_triton
@pytest.mark.parametrize("splits", [False, True], ids=["one program", "splits"])
@pytest.mark.parametrize("targets", ["int8", "sparse"])
@pytest.mark.parametrize("loss", ["bce", "asl", "softmax"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block(block: Block, loss: str, targets: str, splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not splits:
        monkeypatch.setattr(shared, "device_of", lambda tensor: Device(90, 0, 0))
    problem = Problem(block, torch.float32, loss, targets, DEVICE)
    expect(problem, run(problem.copy()))


@needs_triton
@pytest.mark.parametrize("targets", ["int8", "sparse"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nan(loss: str, targets: str) -> None:
    """A NaN makes its own loss and gradient NaN, and in a softmax those of its row."""
    problem = Problem(Block(1, 3, 83), torch.float32, loss, targets, DEVICE)
    clean = run(problem.copy())
    y = problem.dense()
    positive = int((y[1] > 0).nonzero()[0]) if bool((y[1] > 0).any()) else 5
    for c in (positive, 40):
        dirty = problem.copy()
        dirty.z[0, 1, c] = math.nan
        results = run(dirty)
        expected = torch.zeros_like(dirty.z, dtype=torch.bool)
        if problem.arguments.loss == "softmax":
            expected[:, 1] = True
            lse = results["statistics"][:, 0] + results["statistics"][:, 1].log()
            assert lse.isnan().tolist() == [False, True, False]
        else:
            expected[0, 1, c] = bool(y[1, c] >= 0)
            assert results["row_loss"].isnan().tolist() == [False, bool(y[1, c] >= 0), False]
        assert torch.equal(results["dz"].isnan(), expected)
        assert torch.equal(results["dz"][:, [0, 2]], clean["dz"][:, [0, 2]])


@needs_triton
def test_extreme_logits() -> None:
    for loss in LOSSES:
        problem = Problem(Block(1, 3, 83), torch.float32, loss, "int8", DEVICE)
        problem.z *= 40
        expect(problem, run(problem.copy()))


@needs_triton
@pytest.mark.parametrize("loss", ["bce", "asl"])
def test_the_loss_alone(loss: str) -> None:
    problem = Problem(Block(2, 3, 50), torch.float32, loss, "int8", DEVICE)
    alone, both = problem.copy(), run(problem.copy())
    results = run(alone, need_dz=False)
    assert torch.equal(alone.z, problem.z)
    assert torch.equal(results["row_loss"], both["row_loss"])


@needs_triton
def test_several_blocks_of_a_softmax() -> None:
    """Statistics of one block after another are those of all classes."""
    whole = Problem(Block(1, 3, 300), torch.float32, "softmax", "sparse", DEVICE)
    expected = run(whole.copy())
    problem, a = whole.copy(), whole.arguments
    for first in (0, 128, 256):
        part = problem.z[:, :, first : first + 128]
        kernels.softmax_statistics(
            part, whole.bias, first, 0, 300, a.targets, a.offsets, a.values, a.class_weight, a.label_smoothing,
            problem.statistics,
        )  # fmt: skip
    torch.testing.assert_close(problem.statistics, expected["statistics"])


@needs_triton
@pytest.mark.parametrize("factor", [0.25, 1.0, math.nan])
def test_scale(factor: float) -> None:
    scalar = torch.tensor(factor, device=DEVICE)
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(3, 70, 41, device=DEVICE).to(dtype)
        for tensor in (x, x.permute(2, 0, 1), x[1:].transpose(1, 2), x[:0]):
            changed = tensor.clone(memory_format=torch.preserve_format)
            kernels.scale(changed, scalar)
            torch.testing.assert_close(changed, tensor * scalar.to(dtype), equal_nan=True)
    part = x[1:]
    before = x.clone()
    kernels.scale(part, torch.tensor(2.0, device=DEVICE))
    assert torch.equal(x[0], before[0])
    assert torch.equal(x[1:], before[1:] * 2)


@needs_triton
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing(shape: tuple[int, int, int]) -> None:
    for loss in ("bce", "softmax"):
        problem = Problem(Block(*shape, num_classes=10), torch.float32, loss, "int8", DEVICE)
        results = run(problem.copy())
        for name in {"row_loss", "statistics"} & results.keys():
            assert torch.equal(results[name], getattr(problem, name))


def test_tiles_hold_no_fewer_logits_than_threads() -> None:
    for g in (1, 2, 80, 100):
        for n, loss in itertools.product((1, 13, 97, 1000, 100_000), ("bce", "asl", "softmax")):
            tile = shared.loss_tile(g, n, loss)
            numbers = tile.BLOCK_I * tile.BLOCK_N
            assert 32 * tile.num_warps <= numbers <= 1024
            assert n >= 512 or tile.BLOCK_N >= n
            assert tile.tiles(g, n) * numbers >= g * n


@pytest.mark.parametrize("device", [H100, SMALL], ids=["H100", "one multiprocessor"])
def test_programs(device: Device) -> None:
    for tiles in (1, 2, 9, 1000):
        for b in (1, 7, 256, 100_000):
            per_program = shared.tiles_per_program(tiles, b, device)
            splits = -(-tiles // per_program)
            assert 1 <= per_program <= tiles
            assert splits == 1 or b * splits <= 8 * device.multiprocessors
