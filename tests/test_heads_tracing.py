"""Whole decoder heads under torch.compile with a dynamic batch, in 16 bits, and on a GPU in CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mlhead import CSRAHead, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from mlhead.heads import Head

D, C, E = 12, 7, 16
SMALL: dict[str, Any] = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24}
HEADS = {
    "ml_decoder": lambda: MLDecoder(D, C, groups=3, **SMALL, dropout=0.2),
    "ml_decoder, shared": lambda: MLDecoder(D, C, groups=3, **SMALL, dropout=0.2, shared_query_dropout=True),
    # So few queries that the projections of keys and values are absorbed.
    "ml_decoder, absorbed": lambda: MLDecoder(D, 2, groups=1, embed_dim=64, num_heads=4, dropout=0.2),
    "transformer_decoder": lambda: TransformerDecoder(D, C, **SMALL, dropout=0.2),
    "csra": lambda: CSRAHead(D, C, num_heads=2),
    "zero_shot": lambda: ZeroShotMLDecoder(D, C, word_vectors=torch.randn(C, 5), **SMALL, dropout=0.2),
    "zero_shot, groups": lambda: ZeroShotMLDecoder(D, C, word_vectors=torch.randn(C, 5), groups=3, **SMALL),
}
every_head = pytest.mark.parametrize("name", HEADS)


@every_head
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_serves_every_batch(name: str, training: bool) -> None:
    """Forward and backward through inductor's front end: no break, no second compilation at other batches."""
    torch._dynamo.reset()
    head: Head = HEADS[name]().train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compilations = []
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend=counter)
    for batch in (4, 6, 9):
        x = torch.randn(batch, 9, D, requires_grad=True)
        logits = compiled(x)
        (grad,) = torch.autograd.grad(logits, x, torch.ones_like(logits))
        assert logits.shape == (batch, head.num_classes)
        assert grad.isfinite().all()
        if not training:
            torch.testing.assert_close(logits, head(x))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@every_head
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """Under autocast and with 16-bit parameters: the logits' dtype is that dtype, gradients those of the parameters."""
    head: Head = HEADS[name]()
    x = torch.randn(3, 9, D)
    with torch.autocast("cpu", dtype=dtype):
        mixed = head(x)
    low = HEADS[name]().to(dtype)
    pure = low(x.to(dtype))
    for logits, module, of_gradients in ((mixed, head, torch.float32), (pure, low, dtype)):
        assert logits.dtype == dtype
        logits.float().square().mean().backward()
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == of_gradients, key
                assert parameter.grad.isfinite().all(), key


@pytest.mark.gpu
@every_head
def test_no_synchronisation_on_cuda(name: str) -> None:
    head: Head = HEADS[name]().cuda()
    x = torch.randn(4, 9, D, device="cuda", requires_grad=True)
    head(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@every_head
def test_cuda_graph_of_a_training_step(name: str) -> None:
    """Captured and replayed: in evaluation the same logits and gradients, in training new masks at every replay."""
    head: Head = HEADS[name]().cuda()
    x = torch.randn(4, 9, D, device="cuda", requires_grad=True)
    for training in (False, True):
        head.train(training)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(head(x).sum(), x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = head(x)
            (grad,) = torch.autograd.grad(logits.sum(), x)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        first, first_grad = logits.clone(), grad.clone()
        graph.replay()
        if training and name != "csra":  # which has no dropout
            assert not torch.equal(first, logits)
        else:
            expected = head(x)
            torch.testing.assert_close(first, expected)
            torch.testing.assert_close(first_grad, torch.autograd.grad(expected.sum(), x)[0])
            assert torch.equal(first, logits)
