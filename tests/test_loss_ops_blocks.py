"""Blocks and chunks of the losses in the head: any size gives the same, and memory does not grow with the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from loss_heads import BACKENDS, LOSSES, TEMPERATURES, B, C, arguments_of, each_backend, make_head, make_labels
from peak import printed_by
from torch import Tensor

from mlhead import SparseTargets, _backend, csra_loss, group_fc_loss, linear_loss, losses
from mlhead.ops import _csra_plan, _loss_chunks
from mlhead.ops._loss_kernels import ExtensionKernels, PlainKernels


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 1), (100, 50), (400, 300), (4000, 10_000)])
def test_blocks_of_any_size_give_the_same(loss: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that Triton and CUDA use, with the kernels that run here."""
    leaves = make_head()
    y = make_labels()
    targets = SparseTargets.from_dense(y)
    want = group_fc_loss(*leaves, targets, C, loss=loss, backend="reference")
    grads = torch.autograd.grad(want, leaves)
    monkeypatch.setitem(_loss_chunks.SIZES, "cpu", _loss_chunks.Sizes(*sizes))
    a = arguments_of(leaves[0], targets, {"loss": loss})
    for kernels in (PlainKernels(), *([ExtensionKernels()] if "cpp" in BACKENDS else [])):
        launcher = _loss_chunks.Chunked(kernels)
        detached = [t.detach() for t in leaves]
        results = launcher.group_fc_loss(*detached, *a)
        for got, expected in zip(results, (want, *grads), strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(launcher.group_fc_loss(*detached, *a._replace(make=[False] * 3))[0], want)
        dout = torch.tensor(2.5, dtype=torch.float64)
        for got, expected in zip(launcher.group_fc_loss_backward(dout, *detached, *a, [True] * 3), grads, strict=True):
            torch.testing.assert_close(got, 2.5 * expected)


def test_blocks_cover_every_class_once() -> None:
    for G_, E_, C_ in ((1, 8, 1000), (100, 4, 9605), (7, 3, 20), (2000, 2, 2001), (3, 5, 3), (4, 0, 9), (2, 4, 0)):
        J = -(-C_ // G_)
        for most_logits, most_weights in ((1, 1), (64, 200), (10**9, 10**9), (3, 10**9)):
            seen = []
            for block in _loss_chunks.plan_blocks(G_, E_, J, C_, most_logits, most_weights):
                for i, g in enumerate(range(block.groups.start, block.groups.stop)):
                    classes = [g * J + j for j in range(block.columns.start, block.columns.stop)]
                    assert classes[0] == block.first + i * J
                    seen += classes
            assert seen == list(range(C_)), (G_, E_, C_, most_logits, most_weights)


@pytest.mark.parametrize("scratch", [200, 3000, 8 << 20])
@pytest.mark.parametrize("loss", LOSSES)
def test_csra_chunks_of_any_size_give_the_same(scratch: int, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cpp" not in BACKENDS:
        pytest.skip(str(_backend.unavailable("cpp")))
    torch.manual_seed(0)
    x = torch.randn(B, 9, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, C, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, C, dtype=torch.float64, requires_grad=True)
    machine = dataclasses.replace(_csra_plan.MACHINES["cpu"], scratch_bytes=scratch)
    monkeypatch.setitem(_csra_plan.MACHINES, "cpu", machine)
    results = []
    y, leaves = make_labels().double(), (x, weight, bias)
    for backend in ("reference", "cpp"):
        value = csra_loss(*leaves, y, loss=loss, normalize=True, backend=backend, **TEMPERATURES)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import SparseTargets, csra_loss, group_fc_loss, linear_loss
C, backend, op, B, E = int(sys.argv[1]), sys.argv[2], sys.argv[3], 32, 8
def step(C):
    targets = SparseTargets.from_lists([[b, b + 40] for b in range(B)], C)
    if op == "linear":
        x, weight = torch.randn(B, E), torch.randn(C, E).requires_grad_()
        run = lambda: linear_loss(x, weight, None, targets, loss="asl", backend=backend)
    elif op == "group":
        x, weight = torch.randn(B, 10, E), torch.randn(10, E, C // 10).requires_grad_()
        run = lambda: group_fc_loss(x, weight, None, targets, C, loss="asl", backend=backend)
    else:
        x, weight = torch.randn(B, 16, E), torch.randn(1, C, E).requires_grad_()
        run = lambda: csra_loss(x, weight, None, targets, temperatures=(1.0,), lam=0.1, backend=backend)
    x.requires_grad_()
    before = peak()
    run().backward()
    assert weight.grad.abs().sum() > 0
    return peak() - before
step(2000)
print(step(C))
"""


@each_backend
@pytest.mark.parametrize("op", ["linear", "group", "csra"])
def test_memory_does_not_grow_with_the_logits(op: str, backend: str) -> None:
    """Peak resident memory of a step while C grows 8-fold; of 200,000 classes 26 MB of logits, 410 of scores."""
    few, many = (printed_by(PEAK, C, backend, op) for C in (25_000, 200_000))
    allowed = 175_000 * 8 * 4  # the weight's gradient
    assert 0.8 * allowed < many - few < allowed + 10_000_000, (few, many, allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_memory_on_a_gpu(backend: str) -> None:
    """Beyond weight and gradient under 2 % of what eager ASL takes."""
    batch, width, classes = 256, 64, 1_000_000
    x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = SparseTargets.from_lists([[b] for b in range(batch)], classes).to("cuda")

    def eager() -> Tensor:
        return losses.asymmetric_loss(x @ weight.t(), targets.to_dense())

    def fused() -> Tensor:
        return linear_loss(x, weight, None, targets, loss="asl", backend=backend)

    def peak(loss: Callable[[], Tensor]) -> int:
        loss().backward()  # libraries allocate their workspaces
        x.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        torch.cuda.synchronize()
        x.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    gradient = weight.numel() * weight.element_size()
    assert peak(fused) - gradient < 0.02 * peak(eager)
