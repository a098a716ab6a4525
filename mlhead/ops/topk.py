"""The classes with the largest logits, and the logits of chosen classes, without all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _backend, _check
from ..reference import group_fc as reference
from ._fused import _library, _others, autocast, is_autocasting
from ._loss_chunks import blocks_of
from ._targets import may_read_values
from .group_fc import _group_fc, check_group_fc
from .linear_loss import check_linear


def _first_largest(scores: Tensor, k: int) -> Tensor:
    """Columns (B, k) of the k largest of each row in descending order; of equal ones the left one comes first."""
    if scores.dtype == torch.float64:
        return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    # torch.topk leaves open which of equal scores it takes. Here no two keys are equal: the bits of the score in fp32,
    # as an integer that is ordered as the scores are, then the column, from the right.
    wide = scores.float() + 0.0  # -0 becomes 0
    bits = wide.masked_fill_(wide.isnan(), torch.nan).view(torch.int32)  # NaN of either sign becomes the largest
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    columns = torch.arange(scores.shape[1], device=scores.device)
    return torch.topk(torch.add(-columns, bits, alpha=1 << 32), k, dim=1).indices


def first_largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (B, n) and their columns, as `group_fc_topk` has them."""
    columns = _first_largest(scores, k)
    return scores.gather(1, columns), columns


def merge_topk(best: tuple[Tensor, Tensor] | None, found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Scores and classes (B, k) of the k largest of those before and of others, whose classes are higher."""
    if best is None:
        return found
    # The classes found before are lower, so they stand to the left.
    scores, classes = (torch.cat(pair, 1) for pair in zip(best, found, strict=True))
    order = _first_largest(scores, min(k, scores.shape[1]))
    return scores.gather(1, order), classes.gather(1, order)


def _topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int, num_classes: int, backend: str) -> Any:
    """Scores and classes of the k largest logits, a block of classes at a time."""
    scores, classes = h.new_empty(h.shape[0], 0), h.new_empty(h.shape[0], 0, dtype=torch.int64)
    for block in blocks_of(h, weight, num_classes):
        w = weight[block.groups, :, block.columns]
        n = w.shape[0] * w.shape[2]
        b = None if bias is None else bias[block.first : block.first + n]
        logits = _group_fc(h[:, block.groups], w, b, n, backend=backend)
        best, columns = first_largest(logits, min(k, n))
        scores, classes = merge_topk((scores, classes), (best, columns + block.first), k)
    return scores, classes


def _fake(h: Tensor, weight: Tensor, bias: Tensor | None, k: int, num_classes: int, backend: str) -> Any:
    return h.new_empty(h.shape[0], k), h.new_empty(h.shape[0], k, dtype=torch.int64)


# For torch.compile and export: one node in the place of a loop over blocks.
_library.define(
    "group_fc_topk(Tensor h, Tensor weight, Tensor? bias, SymInt k, SymInt num_classes, str backend)"
    " -> (Tensor, Tensor)"
)
_library.impl("group_fc_topk", _topk, "CompositeExplicitAutograd")
torch.library.register_fake("mlhead::group_fc_topk", _fake, lib=_library)
_others[torch.ops.mlhead.group_fc_topk.default] = reference.group_fc_topk


def _run_topk(
    where: str, h: Tensor, weight: Tensor, bias: Tensor | None, k: int, C: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    _check.check_positive(where, "k", k)
    if k > C:
        _check.fail(where, "k", f"in [1, C] = [1, {C}]", k)
    run = torch.ops.mlhead.group_fc_topk.default if torch.compiler.is_compiling() else _topk
    with torch.no_grad():
        return run(h, weight, bias, k, C, _backend.requested(backend))


def group_fc_topk(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    num_classes: int | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest logits of `group_fc(h, weight, bias)` in each row, and their classes, without the logits.

    Args:
        h: Group embeddings (B, G, E), floating.
        weight: (G, E, J) with J = ceil(C / G), of the dtype of h; or (E, 1), shared by all queries (then C = G).
        bias: (C), or (1) with a shared weight, or None.
        k: How many, in [1, C]; meant to be far fewer than C.
        num_classes: C. By default the length of `bias`, else G * J.
        backend: Of the products, as for `group_fc`; None takes the surrounding `backend(...)`.

    Returns:
        Scores (B, k) of the dtype of h, largest first, and classes (B, k) int64. They carry no gradient; that of the
        scores is to be had from `group_fc_select` with these classes. Under autocast all inputs are cast to autocast's
        dtype first.

    Raises:
        ValueError: A shape, a device or k does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, the dtypes differ, or k is no integer.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        The scores are those of `group_fc` of a block of classes. NaN counts as the largest, as in `torch.topk`; of
        equal scores, and of several NaN, the lower class comes first. Deterministic.

    Memory:
        Beyond inputs and results a constant: on a CPU 2 MiB of logits at a time, on a GPU 24 MiB, and a few times that
        for their order; and a few times the results.

    Source:
        ML-Decoder, Eq. 3.
    """
    where = "group_fc_topk"
    device_type = h.device.type if isinstance(h, Tensor) else "cpu"
    if is_autocasting(device_type):
        h, weight, bias = autocast(device_type, h, weight, bias)  # type: ignore[assignment]
    h, weight, bias, C = check_group_fc(where, h, weight, bias, num_classes)
    if weight.ndim == 2:  # one weight for all queries: G groups of one class each
        weight = weight.expand(C, h.shape[2], 1)
        bias = None if bias is None else bias.expand(C)
    return _run_topk(where, h, weight, bias, k, C, backend)


def linear_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest logits of `x @ weight.T + bias` in each row, and their classes, without the logits.

    Args:
        x: Features (B, D), floating.
        weight: (C, D) of the dtype of x, as of `torch.nn.Linear`.
        bias: (C) or None.
        k: How many, in [1, C]; meant to be far fewer than C.
        backend: As for `group_fc_topk`.

    Returns:
        Scores (B, k) and classes (B, k) as of `group_fc_topk`, of which this is one group of C classes; what it says
        of numerics and memory holds here too.

    Raises:
        ValueError: A shape, a device or k does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, the dtypes differ, or k is no integer.
        BackendError: An explicitly chosen backend cannot run this call.
    """
    where = "linear_topk"
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if is_autocasting(device_type):
        x, weight, bias = autocast(device_type, x, weight, bias)  # type: ignore[assignment]
    check_linear(where, x, weight, bias)
    return _run_topk(where, x.unsqueeze(1), weight.t().unsqueeze(0), bias, k, weight.shape[0], backend)


def _check_classes(where: str, classes: Tensor, B: int, C: int, device: torch.device) -> Tensor:
    """Classes (K) or (B, K) in int64, in [0, C) as far as that can be seen or asserted here."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if not isinstance(classes, Tensor) or classes.dtype not in integers:
        got = classes.dtype if isinstance(classes, Tensor) else type(classes).__name__
        _check.fail(where, "classes", "a tensor of integers", got, TypeError)
    if classes.ndim not in (1, 2) or (classes.ndim == 2 and classes.shape[0] != B):
        _check.fail(where, "classes", f"(K,) or (B, K) with B = {B}", tuple(classes.shape))
    if classes.device != device:
        _check.fail(where, "classes", f"on {device} like the features", classes.device)
    if classes.numel() and may_read_values(classes):
        inside = (classes >= 0) & (classes < C)
        if device.type == "cuda":
            torch._assert_async(inside.all(), f"{where}: classes must be in [0, {C})")
        elif not inside.all():
            _check.fail(where, "classes", f"in [0, C) = [0, {C})", int(classes[~inside][0]))
    return classes.long()


def group_fc_select(
    h: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, num_classes: int | None = None
) -> Tensor:
    """The logits of `group_fc(h, weight, bias)` of chosen classes only, differentiable.

    Args:
        h: Group embeddings (B, G, E), floating.
        weight: (G, E, J) with J = ceil(C / G), of the dtype of h; or (E, 1), shared by all queries (then C = G).
        bias: (C), or (1) with a shared weight, or None.
        classes: (K), the same for all images, or (B, K), each image's own; integers in [0, C), in any order and also
            more than once.
        num_classes: C. By default the length of `bias`, else G * J.

    Returns:
        Logits (B, K) of the dtype of h. Under autocast all inputs are cast to autocast's dtype first.

    Raises:
        ValueError: A shape or device does not fit, or on the CPU a class is out of range; the message names the
            argument. On CUDA a class out of range ends in a device assertion.
        TypeError: An argument is no floating tensor, the dtypes differ, or classes are no integers.

    Memory:
        The chosen columns of the weight, K * E for common classes and B * K * E for each image's own, and B * K * E of
        embeddings where G > 1. The gradient of the weight is as large as the weight, as autograd's always is.

    Numerics:
        Plain torch: products of the dtype of h, whose sums are fp32 for 16 bits, on every device torch runs on.

    Source:
        ML-Decoder, Eq. 3, of some of its classes.
    """
    where = "group_fc_select"
    device_type = h.device.type if isinstance(h, Tensor) else "cpu"
    if is_autocasting(device_type):
        h, weight, bias = autocast(device_type, h, weight, bias)  # type: ignore[assignment]
    h, weight, bias, C = check_group_fc(where, h, weight, bias, num_classes)
    B, G = h.shape[:2]
    classes = _check_classes(where, classes, B, C, h.device)
    own = classes.ndim == 2
    shared = weight.ndim == 2
    if G == 1 and not shared:
        return _select(h[:, 0], weight[0].t(), bias, classes)
    J = 1 if shared else max(weight.shape[2], 1)
    group = classes.div(J, rounding_mode="floor")
    chosen = h.gather(1, group.unsqueeze(2).expand(-1, -1, h.shape[2])) if own else h[:, group]  # (B, K, E)
    if shared:
        return F.linear(chosen, weight.t(), bias).squeeze(2)
    columns = weight[group, :, classes - group * J]  # (K, E) or (B, K, E)
    b = None if bias is None else bias[classes].reshape(-1, 1, 1)
    if own:  # a row times a column for each image and class
        products = _batched(chosen.flatten(0, 1).unsqueeze(1), columns.flatten(0, 1).unsqueeze(2), b)
        return products.view(classes.shape)
    # A matrix (B, E) times a column (E, 1) for each class.
    return _batched(chosen.transpose(0, 1), columns.unsqueeze(2), b).squeeze(2).t()


def _batched(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The products of matrices (n, p, q) and (n, q, 1), plus bias, with one rounding where torch has it so."""
    if bias is None:
        return torch.bmm(a, b)
    return torch.baddbmm(bias.expand(a.shape[0], a.shape[1], 1), a, b)


def _select(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """Logits (B, K) of x (B, D) and weight (C, D)."""
    rows, b = weight[classes], None if bias is None else bias[classes]
    if classes.ndim == 1:
        return F.linear(x, rows, b)
    return _batched(rows, x.unsqueeze(2), None if b is None else b.unsqueeze(2)).squeeze(2)


def linear_select(x: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """The logits of `x @ weight.T + bias` of chosen classes only, differentiable.

    Args:
        x: Features (B, D), floating.
        weight: (C, D) of the dtype of x, as of `torch.nn.Linear`.
        bias: (C) or None.
        classes: (K) or (B, K), as for `group_fc_select`.

    Returns:
        Logits (B, K) as of `group_fc_select`; what it says of memory and numerics holds here too.

    Raises:
        ValueError: A shape or device does not fit, or on the CPU a class is out of range; the message names the
            argument. On CUDA a class out of range ends in a device assertion.
        TypeError: An argument is no floating tensor, the dtypes differ, or classes are no integers.
    """
    where = "linear_select"
    device_type = x.device.type if isinstance(x, Tensor) else "cpu"
    if is_autocasting(device_type):
        x, weight, bias = autocast(device_type, x, weight, bias)  # type: ignore[assignment]
    check_linear(where, x, weight, bias)
    return _select(x, weight, bias, _check_classes(where, classes, x.shape[0], weight.shape[0], x.device))
