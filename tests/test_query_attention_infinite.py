"""Scores of -inf in query_attention on every backend: no weight, and NaN where a query has no other score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlhead import _backend, query_attention, query_attention_weights

# Of numpy, with which Triton's interpreter computes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":  # part of what gpu-check runs
    pytestmark.append(pytest.mark.gpu)
REFUSALS = {
    name: _backend._refusal("query_attention", _backend.implementations("query_attention"), name, DEVICE, torch.float32)
    for name in ("triton", "cpp", "cuda")
}
each_backend = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        *(pytest.param(n, marks=pytest.mark.skipif(r is not None, reason=f"{r}")) for n, r in REFUSALS.items()),
    ],
)
B, G, E, H = 3, 5, 8, 2


def inputs(L: int, per_image: bool, masked: bool) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v: image 0 has scores of -inf alone in head 0, where attended; image 2 attends to nothing, if masked."""
    torch.manual_seed(1)
    q = torch.rand(B, G, E) if per_image else torch.rand(G, E)
    k, v = torch.randn(B, L, E), torch.randn(B, L, E)
    mask = None
    if masked:
        mask = torch.arange(L).expand(B, L) % 3 != 2
        mask = mask.clone()
        mask[2] = False
    attended = torch.ones(L, dtype=torch.bool) if mask is None else mask[0]
    k[0, attended, 1] = -math.inf  # q is positive
    return [t.to(DEVICE).requires_grad_() for t in (q, k, v)], None if mask is None else mask.to(DEVICE)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As torch has it, in fp64, with 0 for an image without any key."""
    q, k, v = (t.double().unflatten(-1, (H, -1)).transpose(-2, -3) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(E // H)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        weights = scores.softmax(-1).masked_fill(~mask.any(1)[:, None, None, None], 0.0)
        v = v.masked_fill(~mask[:, None, :, None], 0.0)
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@each_backend
@pytest.mark.parametrize("L", [6, 150])  # one tile of positions, and several
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_nothing_but_minus_infinity_is_nan(
    backend: str, L: int, masked: bool, per_image: bool, dropout_p: float
) -> None:
    leaves, mask = inputs(L, per_image, masked)
    options = {"key_mask": mask, "dropout_p": dropout_p, "seed": 3}
    out = query_attention(*leaves, H, **options, backend=backend)
    dout = torch.randn_like(out)
    assert bool(out[0, :, : E // H].isnan().all())
    assert bool(out[0, :, E // H :].isfinite().all() and out[1:].isfinite().all())
    if masked:
        assert bool((out[2] == 0).all())
    if dropout_p == 0:
        want = softmax_attention(*(t.detach() for t in leaves), mask)
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)

    # Gradients: NaN where they are NaN in plain torch, and nowhere else.
    expected = query_attention(*leaves, H, **options, backend="reference")
    for got, want in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("masked", [False, True])
def test_weights_of_maps(masked: bool) -> None:
    (q, k, _), mask = inputs(6, False, masked)
    weights = query_attention_weights(q, k, H, key_mask=mask)
    assert bool(weights[0].isnan().all())  # the mean over the heads
    assert bool(weights[1:].isfinite().all())


@each_backend
@pytest.mark.parametrize("L", [6, 150])
def test_one_score_of_minus_infinity_has_no_weight(backend: str, L: int) -> None:
    """The output is that without its position."""
    (q, k, v), _ = inputs(L, False, False)
    k = torch.randn(B, L, E, device=DEVICE)
    k[:, 1, 1] = -math.inf
    mask = (torch.arange(L, device=DEVICE) != 1).expand(B, L)
    out, want = (query_attention(q, k, v, H, key_mask=m, backend=b) for m, b in ((None, backend), (mask, "reference")))
    torch.testing.assert_close(out[..., : E // H], want[..., : E // H], rtol=1e-5, atol=1e-6)
