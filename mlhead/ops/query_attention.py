"""The op query_attention: cross-attention of a fixed set of queries over the positions of each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check
from .._backend import Implementation
from ..reference import query_attention as reference
from ._fused import FusedOp, autocast, is_autocasting
from ._seed import seed_tensor

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> Any:
    from ..kernels import query_attention

    return query_attention


class _Extension:
    """The launchers of the C++/CUDA extension."""

    @staticmethod
    def query_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.mlhead_C.query_attention.default(*inputs)

    @staticmethod
    def query_attention_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, needs = args
        return torch.ops.mlhead_C.query_attention_backward.default(*tensors, *needs)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, G, E = k.shape[0], q.shape[-2], q.shape[-1]
    out = q.new_empty(B, G, E)
    backend = _backend.resolve("query_attention", backend, q.device, q.dtype)
    if backend == "reference":
        return out, q.new_empty(0)
    shape = (B, num_heads, G) if backend == "triton" else (B, num_heads, 2, G)
    return out, q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.query_attention(*inputs), inputs[0].new_empty(0)


def _reference_grad(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.query_attention_grad(*args[:-2])  # without the output and what another backend kept


# The second output is what a backend keeps of the scores of each query for backward: in the extension the largest and
# 1 / sum of exponentials (B, H, 2, G), in Triton lse (B, H, G).
_query_attention = FusedOp(
    "query_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, int num_heads, float dropout_p",
    outputs=2,
    keeps_output=True,
    differentiable=(0, 1, 2),
    reference=_reference,
    reference_grad=_reference_grad,
    fake=_fake,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
    },
)


def _check_queries(where: str, q: Tensor, k: Tensor, num_heads: int, key_mask: Tensor | None) -> None:
    _check.check_tensor(where, "k", k)
    _check.check_ndim(where, "k", k, "(B, L, E)")
    B, L, E = k.shape
    if L == 0 or E == 0:
        _check.fail(where, "k", "of at least one position and feature (L, E >= 1)", tuple(k.shape))
    _check.check_tensor(where, "q", q)
    if q.ndim not in (2, 3):
        _check.fail(where, "q", "(G, E) or (B, G, E)", tuple(q.shape))
    letters, sizes = ("(G, E)", (q.shape[0], E)) if q.ndim == 2 else ("(B, G, E)", (B, q.shape[1], E))
    _check.check_shape(where, "q", q, letters, sizes)
    _check.check_like(where, "q", q, "k", k)
    _check.check_positive(where, "num_heads", num_heads)
    if E % num_heads:
        _check.fail(where, "num_heads", f"a divisor of E = {E}", num_heads)
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
            got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
            _check.fail(where, "key_mask", "a bool tensor, True = attend", got, TypeError)
        _check.check_shape(where, "key_mask", key_mask, "(B, L)", (B, L))
        if key_mask.device != k.device:
            _check.fail(where, "key_mask", f"on {k.device} like k", key_mask.device)


def query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention of queries over the positions of each image; queries are usually shared by the batch.

    out[b, g, :] = concat_h dropout(softmax_l(q_h[g] . k_h[b, l] / sqrt(E / H))) v_h[b, l]

    Args:
        q: Projected queries (G, E), the same for every image, or (B, G, E).
        k: Projected keys (B, L, E), L >= 1.
        v: Projected values (B, L, E).
        num_heads: H, a divisor of E; a head is E / H wide, any width.
        dropout_p: Probability in [0, 1) of dropping an attention weight; the rest are scaled by 1 / (1 - dropout_p).
        seed: Of the dropout mask: an integer, an int64 scalar tensor, or None for a fresh one from torch's generator.
            Image b of seed s has the mask of image b - 1 of seed s + 1, so do not count seeds up: draw them.
            The mask is a function of the seed and the position alone, the same in backward and on every backend.
        key_mask: (B, L) bool, True where a position may be attended. An image without any gives 0.
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.

    Returns:
        (B, G, E) of the dtype of q, contiguous; under autocast q, k and v are cast to autocast's dtype first.

    Raises:
        ValueError: A shape, a device, num_heads or dropout_p does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, the dtypes differ, the mask is not bool, or the seed is of a wrong
            type or dtype.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        Products in the dtype of q with fp32 sums, softmax in fp32 (fp64 for fp64); on a GPU the weights are rounded to
        the dtype of q before they are multiplied by v. The gradient of shared queries is summed over the batch in fp32,
        in an order that is a function of the shape alone. All results are the same bits on every run.
        A score of -inf has no weight; a query whose attended scores are all -inf gives NaN, as a softmax does.

    Memory:
        The (B, H, G, L) weights never exist. Kept for backward: out and one or two numbers for each head and query.
        The reference, which torch.func and gradients of gradients run, holds the weights.

    Source:
        ML-Decoder, Eq. 1 and 4.
    """
    _check.check_tensor("query_attention", "q", q)
    if is_autocasting(q.device.type):
        q, k, v = autocast(q.device.type, q, k, v)  # type: ignore[assignment]
    _check_queries("query_attention", q, k, num_heads, key_mask)
    _check.check_tensor("query_attention", "v", v)
    _check.check_shape("query_attention", "v", v, "(B, L, E)", k.shape)
    _check.check_like("query_attention", "v", v, "k", k)
    _check.check_probability("query_attention", "dropout_p", dropout_p)
    on_device = seed_tensor("query_attention", seed, q.device) if dropout_p > 0.0 else None
    return _query_attention(q, k, v, key_mask, on_device, num_heads, float(dropout_p), backend=backend)[0]


def query_attention_weights(q: Tensor, k: Tensor, num_heads: int, *, key_mask: Tensor | None = None) -> Tensor:
    """Where queries look: softmax_l(q_h[g] . k_h[b, l] / sqrt(E / H)), averaged over the heads.

    Args:
        q: Projected queries (G, E) or (B, G, E).
        k: Projected keys (B, L, E), L >= 1.
        num_heads: H, a divisor of E.
        key_mask: (B, L) bool, True where a position may be attended.

    Returns:
        (B, G, L), non-negative, summing to 1 over L; 0 for an image whose every position is masked.

    Raises:
        ValueError: A shape, a device or num_heads does not fit.
        TypeError: q or k is no floating tensor, the dtypes differ, or the mask is not bool.

    Source:
        ML-Decoder, Fig. 3: the weights of its cross-attention, as `nn.MultiheadAttention` averages it.
    """
    _check.check_tensor("query_attention_weights", "q", q)
    if is_autocasting(q.device.type):
        q, k = autocast(q.device.type, q, k)  # type: ignore[assignment]
    _check_queries("query_attention_weights", q, k, num_heads, key_mask)
    return reference.attention_weights(q, k, key_mask, num_heads).mean(1).to(q.dtype)
