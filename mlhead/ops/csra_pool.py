"""The op csra_pool: class-specific residual attention over all positions of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check
from .._backend import Implementation
from ..reference import csra_pool as reference
from ._csra_chunks import Chunked
from ._csra_kernels import ExtensionPooling, TritonPooling
from ._csra_plan import may_be_kept
from ._fused import FusedOp, autocast, is_autocasting

LARGEST_TEMPERATURE = 1e30  # products of a larger one with scores may pass fp32; T = inf is what it comes to
_HALF = (torch.float16, torch.bfloat16)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: list[float],
    lam: list[float],
    normalize: bool,
    average: float,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    logits = x.new_empty(x.shape[0], weight.shape[1])
    keep = keep and _backend.resolve("csra_pool", backend, x.device, x.dtype) != "reference"
    if not keep or not may_be_kept(x, weight):
        return logits, x.new_empty(0)
    return logits, x.new_empty(x.shape[0] * x.shape[1] * weight.shape[0] * weight.shape[1])


def _reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.csra_pool(*inputs[:-1]), inputs[0].new_empty(0)


def _reference_grad(*args: Any) -> tuple[Tensor | None, ...]:
    return reference.csra_pool_grad(*args[:-2])  # without keep, and without what another backend kept


def _load_triton() -> Chunked:
    from ..kernels import csra_pool

    return Chunked(TritonPooling(csra_pool))


_csra_pool = FusedOp(
    "csra_pool",
    "Tensor x, Tensor weight, Tensor? bias, float[] temperatures, float[] lam, bool normalize, float average, "
    "bool keep",
    outputs=2,
    differentiable=(0, 1, 2),
    reference=_reference,
    reference_grad=_reference_grad,
    fake=_fake,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), lambda: Chunked(ExtensionPooling())),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), lambda: Chunked(ExtensionPooling())),
    },
)


def as_tokens(where: str, x: Tensor) -> Tensor:
    """A map (B, D, H, W) or tokens (B, L, D) as tokens (B, L, D): a view of a contiguous or channels-last map."""
    _check.check_tensor(where, "x", x)
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if x.ndim != 3:
        _check.fail(where, "x", "(B, L, D) tokens or a (B, D, H, W) map", tuple(x.shape))
    if x.shape[1] == 0:
        _check.fail(where, "x", "of at least one position (L >= 1)", tuple(x.shape))
    return x


def _check_weight(where: str, x: Tensor, weight: Tensor) -> None:
    _check.check_tensor(where, "weight", weight)
    _check.check_ndim(where, "weight", weight, "(H, C, D)")
    _check.check_shape(where, "weight", weight, "(H, C, D)", (*weight.shape[:2], x.shape[2]))
    _check.check_like(where, "weight", weight, "x", x)


def _check_temperatures(where: str, temperatures: Sequence[float], H: int) -> list[float]:
    temperatures = [float(T) for T in temperatures]
    if len(temperatures) != H:
        _check.fail(where, "temperatures", f"one number per head (H = {H})", temperatures)
    if not all(0 < T < LARGEST_TEMPERATURE or T == math.inf for T in temperatures):
        _check.fail(where, "temperatures", f"above 0 and below {LARGEST_TEMPERATURE:g}, or math.inf", temperatures)
    return temperatures


def check_csra_pool(
    where: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: float | Sequence[float],
    average: float,
) -> tuple[Tensor, Tensor, Tensor | None, list[float], list[float], float]:
    """The arguments of csra_pool, checked, x as tokens and in autocast's dtype, lam as one number per head."""
    x = as_tokens(where, x)
    if is_autocasting(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    _check_weight(where, x, weight)
    H, C = weight.shape[:2]
    if bias is not None:
        _check.check_tensor(where, "bias", bias)
        _check.check_shape(where, "bias", bias, "(H, C)", (H, C))
        _check.check_like(where, "bias", bias, "x", x)
    T = _check_temperatures(where, temperatures, H)
    try:
        one = isinstance(lam, (int, float)) or getattr(lam, "ndim", None) == 0
        lams = [float(lam)] * H if one else [float(value) for value in lam]  # type: ignore[arg-type, union-attr]
    except TypeError:
        _check.fail(where, "lam", f"one number, or one per head (H = {H})", type(lam).__name__, TypeError)
    if len(lams) != H:
        _check.fail(where, "lam", f"one number, or one per head (H = {H})", lams)
    if not all(-math.inf < value < math.inf for value in lams):
        _check.fail(where, "lam", "finite", lams)
    average = float(average)
    if not -math.inf < average < math.inf:
        _check.fail(where, "average", "finite", average)
    return x, weight, bias, T, lams, average


def csra_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperatures: Sequence[float],
    lam: float | Sequence[float],
    normalize: bool = False,
    average: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Class-specific residual attention pooling (CSRA): every class pools the positions by its own scores.

    s[h,b,c,l]  = sum_d x[b,l,d] * w[h,c,d] + bias[h,c]
    logits[b,c] = sum_h ( average * mean_l s[h,b,c,l] + lam_h * A_{T_h}(s[h,b,c,:]) )
    A_T(s) = sum_l softmax_l(T s)_l s_l,    A_inf(s) = max_l s_l

    Args:
        x: Tokens (B, L, D) or a map (B, D, height, width), floating, L >= 1.
        weight: Classifiers (H, C, D), of the dtype of x; each head owns one.
        bias: (H, C) or None.
        temperatures: H numbers > 0; `math.inf` takes the maximum (its gradient goes to the first maximal position, of
            scores as they are rounded).
        lam: The weight of the attention term, one number or one per head.
        normalize: Divide every classifier by its norm over D first; a zero classifier stays zero.
        average: The weight of the mean: 1 as in the paper, 0 for attention alone (Table 6).
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.

    Returns:
        Logits (B, C) of the dtype of x; under autocast all inputs are cast to autocast's dtype first.

    Raises:
        ValueError: A shape, device, temperature or lam does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, or the dtypes differ.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        Matrix products in the dtype of x with fp32 sums, and scores rounded to that dtype between product and pooling
        where they go through a scratch; norm, softmax and pooling in fp32 (fp64 for fp64). Sums run in a fixed order.
        On the Triton backend temperatures and lam are constants of the kernels: each new list of them compiles anew.

    Memory:
        Scores that take more than a constant (8 MiB on a CPU, 128 MiB on a GPU) never exist whole, forward or backward:
        beyond inputs, output and gradients an op takes a scratch (8 MiB; on a GPU 24 MiB forward and up to 128 MiB
        backward), B C H fp32 statistics (Triton's fused forward: four for each tile that an image touches), and in 16
        bits, where gradients are added up in chunks, an fp32 copy of the smaller one. Fewer scores are kept for
        backward, and there are as many gradients of them. Under torch.func and for gradients of gradients the
        reference keeps all scores. Maps (B, D, height, width) are read where they lie; on a GPU, contiguous ones in
        the chunked form are copied, no more of them at a time than the scratch has bytes.

    Source:
        CSRA, Eq. 2-8, 13 and section 3.4; Fig. 1 is H = 1, T = inf, normalize=False on a trained classifier.
    """
    x, weight, bias, T, lams, average = check_csra_pool("csra_pool", x, weight, bias, temperatures, lam, average)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _csra_pool(x, weight, bias, T, lams, normalize, average, keep, backend=backend)[0]


def csra_attention(
    x: Tensor,
    weight: Tensor,
    classes: Tensor | Sequence[int],
    *,
    temperatures: Sequence[float],
    normalize: bool = False,
) -> Tensor:
    """Where chosen classes look: the attention p[b, h, k, l] = softmax_l(T_h s[h, b, c_k, l]) (CSRA Eq. 2, Fig. 4).

    Args:
        x: Tokens (B, L, D) or a map (B, D, height, width), floating, L >= 1.
        weight: Classifiers (H, C, D).
        classes: Class indices in [0, C): (K,) for all images, or (B, K) for each its own.
        temperatures: H numbers > 0; `math.inf` gives the one-hot of the first maximum.
        normalize: As in `csra_pool`.

    Returns:
        (B, H, K, L), non-negative, summing to 1 over L. A bias would change nothing and is not taken.

    Raises:
        ValueError: A shape, a device, a temperature, or on the CPU a class index, does not fit.
        TypeError: x or weight is no floating tensor, the dtypes differ, or the classes are no integers.
    """
    x = as_tokens("csra_attention", x)
    if is_autocasting(x.device.type):
        x, weight = autocast(x.device.type, x, weight)  # type: ignore[assignment]
    _check_weight("csra_attention", x, weight)
    T = _check_temperatures("csra_attention", temperatures, weight.shape[0])
    index = _check.as_classes("csra_attention", classes)
    B, C = x.shape[0], weight.shape[1]
    if index.ndim not in (1, 2) or (index.ndim == 2 and index.shape[0] != B):
        _check.fail("csra_attention", "classes", f"(K,) or (B, K) with B = {B}", tuple(index.shape))
    # On a GPU reading the values would wait for the device; there torch's own assertion ends a wrong index.
    if index.device.type == "cpu" and index.numel() and not (0 <= index.min() and index.max() < C):
        _check.fail("csra_attention", "classes", f"in [0, C) = [0, {C})", index.tolist())
    index = index.to(weight.device, torch.long)
    # (H, K, D), or (H, B, K, D): every image with the classifiers of its own classes.
    chosen = weight.index_select(1, index.flatten()).unflatten(1, index.shape)
    return reference.csra_attention(x, chosen, None, T, normalize)
