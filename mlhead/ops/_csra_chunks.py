"""csra_pool a chunk at a time: matrix products by torch (the vendor's library), pooling by a kernel of the backend.

The classifiers of all heads are one matrix of N = H C rows, column n = h C + c of the scores. A chunk is a range of
images times a range of columns:

    scores (images, L, columns) = x w^T             into a scratch of constant size, made for the cache
    forward     pool each column over its L scores  -> pooled (B, N) fp32; the logits are its sum over the heads
    backward    turn the scores into ds, then dx += ds w and dw += ds^T x

so the (H, B, C, L) scores never exist whole, unless they are no larger than a constant: then one product makes them,
and they are kept for backward, which spares the fourth product.

What is linear stays outside the products. A classifier's norm divides its scores (`scale`), and ds as it is stored. A
bias shifts all the scores of a class alike, which softmax does not see, so it adds (average + lam) bias, and its
gradient is that multiple of sum_b dlogit. Where more than one chunk adds to dx or dw in 16 bits, the sum is kept in
fp32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._csra_kernels import Options, Pooling
from ._csra_plan import Plan, chunk_plan, is_copied, is_matrix, is_rows, may_be_kept


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds a b to `total` in its dtype, or sets it to that if it is the first."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


class Chunk(NamedTuple):
    """A range of columns: the classifiers' rows, their `scale`, and for fp16 the normalised copy that is multiplied."""

    first: int
    weight: Tensor
    rows: Tensor
    scale: Tensor | None
    norm: Tensor | None

    @property
    def columns(self) -> slice:
        """Of the N columns."""
        return slice(self.first, self.first + self.weight.shape[0])


def split(pooling: Pooling, weight: Tensor, most: int, normalize: bool) -> Iterator[Chunk]:
    """The chunks of at most `most` columns of weight (H, C, D); the classifiers of several heads where they are rows of
    one matrix.
    """
    C = weight.shape[1]
    if is_rows(weight):
        heads = [(0, _matrix(weight))]
    else:
        heads = [(h * C, matrix) for h, matrix in enumerate(weight)]
    for offset, matrix in heads:
        for begin in range(0, matrix.shape[0], most):
            part = matrix[begin : begin + most]
            if not normalize:
                yield Chunk(offset + begin, part, part, None, None)
                continue
            norm, scale = pooling.norms(part)
            if part.dtype == torch.float16:  # a score before the division could pass 65504
                yield Chunk(offset + begin, part, (part / norm[:, None]).to(part.dtype), None, norm)
            else:
                yield Chunk(offset + begin, part, part, scale, norm)


def image_ranges(x: Tensor, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of images, copied where `is_copied` says so."""
    for begin in range(0, x.shape[0], most):
        part = x[begin : begin + most]
        yield slice(begin, begin + part.shape[0]), part.contiguous() if is_copied(x) else part


def make_scores(x: Tensor, rows: Tensor, scores: Tensor) -> None:
    """Raw scores (b, L, n) of some images and columns, into contiguous memory."""
    b, L, D = x.shape
    n = rows.shape[0]
    if is_matrix(x):
        torch.mm(x.as_strided((b * L, D), x.stride()[1:]), rows.t(), out=scores.view(b * L, n))
    else:
        torch.bmm(x, rows.t().expand(b, D, n), out=scores)


def _matrix(weight: Tensor) -> Tensor:
    """The classifiers (H, C, D) as the rows (H C, D) of one matrix: a view of what is one, else a copy."""
    H, C, D = weight.shape
    return weight.as_strided((H * C, D), weight.stride()[1:]) if is_rows(weight) else weight.reshape(H * C, D)


class _Scores:
    """Where scores live: a scratch that every chunk writes anew, or memory that keeps them, chunk after chunk."""

    def __init__(self, x: Tensor, weight: Tensor, plan: Plan, keep: bool, kept: Tensor | None = None) -> None:
        self.B, self.L = x.shape[:2]
        self.keep = keep
        size = self.B * self.L * weight.shape[0] * weight.shape[1] if keep else plan.images * self.L * plan.columns
        self.memory = x.new_empty(size) if kept is None else kept

    def view(self, images: slice, chunk: Chunk) -> Tensor:
        """The place of the scores (b, L, n) of a chunk, contiguous."""
        n = chunk.rows.shape[0]
        if self.keep:
            begin = (self.B * chunk.first + images.start * n) * self.L
        else:
            begin = 0
        b = images.stop - images.start
        return self.memory[begin : begin + b * self.L * n].view(b, self.L, n)


def finish_logits(pooled: Tensor, bias: Tensor | None, options: Options, dtype: torch.dtype) -> Tensor:
    """Logits (B, C) of pooled scores (B, N): the sum over the heads, and the bias (H, C)."""
    B, N = pooled.shape
    H = len(options.lam)
    logits = pooled if H == 1 else pooled.view(B, H, N // H).sum(1)
    if bias is not None:
        for lam, bias_h in zip(options.lam, bias, strict=True):
            logits.add_(bias_h, alpha=options.average + lam)
    return logits.to(dtype)


def forward(
    pooling: Pooling, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, normalize: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """Logits (B, C) of tokens x (B, L, D) and weight (H, C, D), of any strides; and the raw scores if they are kept."""
    B, N = x.shape[0], weight.shape[0] * weight.shape[1]
    if B == 0 or N == 0:
        return x.new_zeros(B, weight.shape[1]), x.new_empty(0)
    keep = keep and may_be_kept(x, weight)
    plan = chunk_plan(x, weight, keep, pools_only=True)
    if not keep and pooling.fuses(x, N, math.ceil(B / plan.images) * math.ceil(N / plan.columns)):
        scale = pooling.norms(_matrix(weight))[1] if normalize else None
        return pooling.fused(x, weight, bias, scale, options), x.new_empty(0)
    pooled = x.new_empty(B, N, dtype=accumulate_dtype(x.dtype))
    memory = _Scores(x, weight, plan, keep)
    for images, part in image_ranges(x, plan.images):
        for chunk in split(pooling, weight, plan.columns, normalize):
            scores = memory.view(images, chunk)
            make_scores(part, chunk.rows, scores)
            pooling.pool(scores, chunk.scale, options, chunk.first, pooled[images, chunk.columns])
    return finish_logits(pooled, bias, options, x.dtype), memory.memory if keep else x.new_empty(0)


def add_gradients(
    ds: Tensor, part: Tensor, chunk: Chunk, images: slice, dx: Tensor | None, total: Tensor | None
) -> None:
    """Adds the gradients that a chunk's ds (b, L, n) brings to dx (B L, D) and to the sum `total` (n, D) of dw."""
    (b, L, n), D = ds.shape, part.shape[2]
    rows = ds.view(b * L, n)
    if dx is not None:
        add_product(dx[images.start * L : images.stop * L], rows, chunk.rows, chunk.first == 0)
    if total is not None and is_matrix(part):
        tokens = part.as_strided((b * L, D), part.stride()[1:])
        add_product(total, rows.t(), tokens, images.start == 0)
    elif total is not None:
        for i in range(b):
            add_product(total, ds[i].t(), part[i], images.start + i == 0)


def through_the_norm(pooling: Pooling, total: Tensor, chunk: Chunk) -> None:
    """The gradient of the raw classifiers from that of the divided ones, in place."""
    if chunk.norm is not None:
        # ds was divided by the norm with its scale; the copy of fp16 was divided itself.
        pooling.unit_rows_backward(total, chunk.weight, chunk.norm, chunk.scale is None)


def backward(
    pooling: Pooling,
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: Options,
    normalize: bool,
    kept: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx, dweight, dbias), contiguous; those not needed are empty tensors. `kept` is not written."""
    need_dx, need_dweight, need_dbias = needs
    (B, L, D), (H, C, _) = x.shape, weight.shape
    empty = dlogits.new_empty(0)
    dbias = bias_gradient(dlogits, options, x.dtype) if need_dbias else empty
    if x.numel() == 0 or weight.numel() == 0 or not (need_dx or need_dweight):
        return x.new_zeros(B, L, D) if need_dx else empty, weight.new_zeros(H, C, D) if need_dweight else empty, dbias

    keep = kept.numel() > 0
    plan = chunk_plan(x, weight, keep)
    raw = _Scores(x, weight, plan, keep, kept if keep else None)
    gradient = _Scores(x, weight, plan, False) if keep else raw
    accumulate = accumulate_dtype(x.dtype)
    one_column_range = plan.columns >= H * C
    # A map that is no matrix of positions adds to dw image by image, a copy of it a range of images at a time.
    one_image_range = plan.images >= B and (is_matrix(x) or is_copied(x))
    dx = x.new_empty((B * L, D), dtype=x.dtype if one_column_range else accumulate) if need_dx else empty
    dweight = x.new_empty(H * C, D) if need_dweight else empty
    for chunk in split(pooling, weight, plan.columns, normalize):
        dw = dweight[chunk.columns] if need_dweight else empty
        in_dw = one_image_range or not need_dweight or dw.dtype == accumulate
        total = dw if in_dw else dw.new_empty(dw.shape, dtype=accumulate)
        for images, part in image_ranges(x, plan.images):
            scores, ds = raw.view(images, chunk), gradient.view(images, chunk)
            if not keep:
                make_scores(part, chunk.rows, scores)
            pooling.pool_backward(scores, chunk.scale, options, chunk.first, dlogits[images], ds)
            add_gradients(ds, part, chunk, images, dx if need_dx else None, total if need_dweight else None)
        if need_dweight:
            through_the_norm(pooling, total, chunk)
        if total is not dw:
            dw.copy_(total)
    return dx.to(x.dtype).view(B, L, D) if need_dx else empty, dweight.view(H, C, D) if need_dweight else empty, dbias


def bias_gradient(dlogits: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """The gradient of the bias (H, C): sum_l ds = dlogit (average + lam), since sum_l p (1 + T (s - A)) = 1."""
    total = dlogits.sum(0, dtype=accumulate_dtype(dtype))
    return torch.stack([total * (options.average + lam) for lam in options.lam]).to(dtype)


class Chunked:
    """The launchers of csra_pool around a backend's two kernels."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling

    def csra_pool(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperatures: Sequence[float],
        lam: Sequence[float],
        normalize: bool,
        average: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and the raw scores where they are kept for backward, else nothing."""
        options = Options(tuple(temperatures), tuple(lam), average, weight.shape[1])
        return forward(self.pooling, x, weight, bias, options, normalize, keep)

    def csra_pool_backward(
        self,
        dlogits: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperatures: Sequence[float],
        lam: Sequence[float],
        normalize: bool,
        average: float,
        keep: bool,
        kept: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients (dx, dweight, dbias)."""
        options = Options(tuple(temperatures), tuple(lam), average, weight.shape[1])
        return backward(self.pooling, dlogits, x, weight, bias, options, normalize, kept, needs)
