"""The heads under torch.compile and torch.export: no graph break, a dynamic batch, one compilation by inductor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_makers import D, every_decoder, every_head

from mlhead.heads import Head


@every_head
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(make: Callable[..., Head], training: bool) -> None:
    """fullgraph=True, values and gradients; aot_eager, since the ops' own tests run inductor."""
    torch._dynamo.reset()
    head = make().train(training)
    for module in head.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, D, 2, 4, requires_grad=True)
    expected, logits = head(x), compiled(x)
    torch.testing.assert_close(logits, expected)
    upstream = torch.randn_like(expected)
    (a,), (b,) = torch.autograd.grad(logits, x, upstream), torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(a, b)


@every_decoder
def test_compiles_with_dropout(make: Callable[..., Head]) -> None:
    """In training with dropout there is no graph break, and calls differ."""
    torch._dynamo.reset()
    head = make(dropout=0.2)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, D)
    first, second = compiled(x), compiled(x)
    assert not torch.allclose(first, second)
    (first + second).sum().backward()
    assert head.duplicate_pooling.grad.abs().sum() > 0


@every_head
def test_exports_with_a_dynamic_batch(make: Callable[..., Head]) -> None:
    """torch.export, run at another batch size."""
    head = make().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(head, (torch.randn(4, D, 2, 4),), dynamic_shapes={"features": {0: batch}})
    x = torch.randn(6, D, 2, 4)
    torch.testing.assert_close(program.module()(x), head(x))


@every_head
def test_inductor_on_one_size(make: Callable[..., Head]) -> None:
    """The default compiler, evaluation only."""
    torch._dynamo.reset()
    head = make().eval()
    x = torch.randn(4, 8, D)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, fullgraph=True)(x), head(x), rtol=1e-5, atol=1e-5)
