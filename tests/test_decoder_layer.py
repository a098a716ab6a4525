"""The decoder layer: what is shared by the batch, where dropout acts, and absorbed projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlhead.heads import Head, MLDecoder, TransformerDecoder, _layer
from mlhead.heads._absorb import absorbs
from mlhead.reference._dropout import keep_mask

D, C, E = 12, 7, 16
SMALL: dict[str, Any] = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24}


def decoder(**options: Any) -> Head:
    return MLDecoder(D, C, groups=3, **SMALL, **options)


def full_decoder(**options: Any) -> Head:
    return MLDecoder(D, C, groups=C, queries="learnable", **SMALL, **options)


def transformer_decoder(**options: Any) -> Head:
    return TransformerDecoder(D, C, **SMALL, **options)


def test_query_dropout_differs_per_image() -> None:
    """The sum q + dropout(q) draws a mask per image, as expanded queries do; without dropout the path is shared."""
    layer = decoder(dropout=0.5).layers[0]
    q, seed = torch.randn(3, E), torch.tensor(5)
    t = layer.queries(q, 4, 0.5, seed)
    factor = keep_mask(seed, 0.5, 4, 1, 3, E).squeeze(1) * 2.0
    torch.testing.assert_close(t, layer.norm1(q + q * factor))
    assert not torch.equal(t[0], t[1])
    assert layer.queries(q, 4).shape == (3, E)


@pytest.mark.parametrize("make", [decoder, full_decoder, transformer_decoder])
def test_query_path_is_shared_unless_dropout_forbids(make: Callable[..., Head]) -> None:
    """What the attention gets: (G, E) in evaluation, at dropout 0 and with shared masks, else (B, G, E)."""
    for dropout, training, masks_shared, shared in (
        (0.1, False, False, True),
        (0.0, True, False, True),
        (0.1, True, True, True),
        (0.1, True, False, False),
    ):
        head = make(dropout=dropout, shared_query_dropout=masks_shared).train(training)
        seen: list[tuple[int, ...]] = []
        head.layers[0].multihead_attn.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(tuple(i[0].shape)))
        logits = head(torch.randn(4, 5, D))
        G = head.groups
        assert seen == [(G, E) if shared else (4, G, E)]
        assert logits.shape == (4, head.num_classes)


def test_attention_dropout_reaches_the_op() -> None:
    """With dropout on the attention weights alone two calls differ."""
    attention = decoder(dropout=0.5).layers[0].multihead_attn
    t, memory = torch.randn(3, E), torch.randn(2, 5, E)
    assert not torch.allclose(attention(t, memory, dropout_p=0.5), attention(t, memory, dropout_p=0.5))
    torch.testing.assert_close(attention(t, memory), attention(t, memory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("dropout_p", "masked"), [(0.0, False), (0.4, False), (0.0, True), (0.4, True)])
def test_absorbed_projections_change_nothing(
    shared: bool, dropout_p: float, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms of the attention give the same output and gradients, under dropout the same masks too."""
    attention = decoder(dtype=dtype).layers[0].multihead_attn
    torch.nn.init.normal_(attention.in_proj_bias)
    torch.nn.init.normal_(attention.out_proj.bias)
    t = torch.randn(3, E, dtype=dtype) if shared else torch.randn(2, 3, E, dtype=dtype)
    memory, dout = torch.randn(2, 5, E, dtype=dtype), torch.randn(2, 3, E, dtype=dtype)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5]) if masked else None
    results = []
    for absorbed in (False, True):
        monkeypatch.setattr(_layer, "absorbs", lambda *args, absorbed=absorbed, **options: absorbed)
        inputs = [t.clone().requires_grad_(), memory.clone().requires_grad_(), *attention.parameters()]
        out = attention(*inputs[:2], mask, dropout_p=dropout_p, seed=torch.tensor(3))
        results.append([out, *torch.autograd.grad(out, inputs, dout)])
    # fp32 is held to what fp64 gives up to rounding: the two forms add in different orders.
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for standard, other in zip(*results, strict=True):
        torch.testing.assert_close(standard, other, **tolerance)
    bias_grad = results[0][1:][2 + [n for n, _ in attention.named_parameters()].index("in_proj_bias")]
    assert (bias_grad[E : 2 * E] == 0).all()  # of the keys
    assert (bias_grad[2 * E :] != 0).any()
    assert (bias_grad[:E] != 0).any()


def test_the_shape_decides_whether_projections_are_absorbed() -> None:
    def choose(B: int, G: int, L: int, shared: bool = True) -> bool:
        return absorbs(B, G, L, 768, 8, shared=shared, device_type="cpu")

    assert choose(64, 20, 196)
    assert choose(64, 20, 196, shared=False)
    assert not choose(64, 20, 49, shared=False)
    assert not choose(64, 100, 49)
    assert not choose(64, 80, 196, shared=False)
    assert not absorbs(64, 20, 196, 768, 1, shared=True, device_type="cpu")  # one head: nothing to gain
    assert not absorbs(64, 20, 196, 768, 8, shared=True, device_type="xpu")
