"""csra_loss a chunk at a time: three matrix products for loss and gradients, where a separate backward needs four.

A chunk is a range of images times a range of classes, all heads of a class together:

    scores = x w^T -> pooled -> logits -> loss and dlogits -> ds, in place of the scores -> dx += ds w, dw += ds^T x

since the loss of a chunk's logits needs no others. The scores live in the scratch of csra_pool's chunks. Softmax, which
needs all logits of a row first, makes the scores twice, unless one chunk has them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..reference.class_loss import LossArguments, accumulation, add_shards
from . import _csra_chunks as chunks
from ._csra_chunks import Chunk
from ._csra_kernels import Options, Pooling
from ._csra_plan import Plan, chunk_plan, fits_the_scratch, is_copied, is_matrix
from ._gradients import empty_gradient
from ._loss_chunks import softmax_rows_loss
from ._loss_kernels import LossKernels, Place


class _Part(NamedTuple):
    """A chunk: its images, their tokens, its classes, their classifiers, the scores, the logits and their place."""

    images: slice
    tokens: Tensor
    classes: slice
    chunk: Chunk
    scores: Tensor
    z: Tensor
    options: Options


class _Call:
    """One call, and its scores one chunk after another in the same memory."""

    def __init__(
        self,
        pooling: Pooling,
        kernels: LossKernels,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperatures: Sequence[float],
        lam: Sequence[float],
        normalize: bool,
        average: float,
        a: LossArguments,
    ) -> None:
        self.pooling, self.kernels, self.x, self.weight, self.bias, self.a = pooling, kernels, x, weight, bias, a
        self.options = Options(tuple(temperatures), tuple(lam), average, 0)
        self.normalize = normalize
        (B, L, _), (H, C, _) = x.shape, weight.shape
        plan = chunk_plan(x, weight, fits_the_scratch(x, weight))
        self.plan = Plan(plan.images, max(1, plan.columns // max(H, 1)))  # columns: classes
        self.wide = accumulation(x.dtype)
        self.factor = a.factor(B)
        self.scratch = x.new_empty(plan.images * L * H * min(self.plan.columns, C))
        self.one = plan.images >= B and self.plan.columns >= C
        self._at_hand = False  # whether the scratch still holds the scores of the only chunk
        self.empty = B == 0 or H * C == 0

    def class_ranges(self) -> Iterator[tuple[slice, Chunk]]:
        """Each range of classes with its classifiers (H n, D): a copy, where several heads are cut."""
        H, C, D = self.weight.shape
        for begin in range(0, C, self.plan.columns):
            classes = slice(begin, min(begin + self.plan.columns, C))
            rows = self.weight[:, classes].reshape(1, H * (classes.stop - begin), D)
            (chunk,) = chunks.split(self.pooling, rows, rows.shape[1], self.normalize)
            yield classes, chunk

    def parts(self, classes: slice, chunk: Chunk) -> Iterator[_Part]:
        """The chunks of a range of classes, with their logits."""
        H, n = self.weight.shape[0], classes.stop - classes.start
        options = self.options._replace(classes=n)
        bias = None if self.bias is None else self.bias[:, classes]
        for images, tokens in chunks.image_ranges(self.x, self.plan.images):
            b, L, _ = tokens.shape
            scores = self.scratch[: b * L * H * n].view(b, L, H * n)
            if not self._at_hand:
                chunks.make_scores(tokens, chunk.rows, scores)
            self._at_hand = False
            pooled = scores.new_empty(b, H * n, dtype=self.wide)
            self.pooling.pool(scores, chunk.scale, options, 0, pooled)
            z = chunks.finish_logits(pooled, bias, options, self.wide).view(1, b, n)
            yield _Part(images, tokens, classes, chunk, scores, z, options)

    def place(self, part: _Part) -> Place:
        """Which classes the logits of a chunk belong to."""
        C = self.weight.shape[1]
        return Place(part.classes.start, C, C)

    def statistics(self) -> Tensor:
        """Softmax's numbers of each row over all classes, (B, 4)."""
        statistics = self.x.new_zeros(self.x.shape[0], 4, dtype=self.wide)
        statistics[:, 0] = -math.inf
        for classes, chunk in () if self.empty else self.class_ranges():
            for part in self.parts(classes, chunk):
                a, mine = self.a.images(part.images), statistics[part.images]
                self.kernels.softmax_statistics(part.z, None, self.place(part), a, mine)
        self._at_hand = self.one
        return statistics


def run(call: _Call, dout: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients (dx, dweight, dbias) for an upstream gradient dout; those not needed are empty."""
    x, weight, a = call.x, call.weight, call.a
    (B, L, D), (H, C, _) = x.shape, weight.shape
    need_dx, need_dweight, need_dbias = needs
    empty = x.new_empty(0)
    row_loss = x.new_zeros(B, dtype=call.wide)
    one_range = call.plan.columns >= C
    dx = x.new_empty((B * L, D), dtype=x.dtype if one_range else call.wide) if need_dx else empty
    dweight = weight.new_empty(H, C, D) if need_dweight else empty
    dbias = x.new_zeros((H, C), dtype=call.wide) if need_dbias else empty
    if call.empty:
        dx, dweight = (t.zero_() for t in (dx, dweight))
    statistics = None
    if a.loss == "softmax":
        statistics = call.statistics()
        add_shards(statistics, a.class_group)
        row_loss = softmax_rows_loss(statistics, a)
    if not call.empty and (any(needs) or statistics is None):
        one_image_range = call.plan.images >= B and (is_matrix(x) or is_copied(x))
        for classes, chunk in call.class_ranges():
            chunk = chunk._replace(first=classes.start)  # 0 sets dx, others add to it
            whole = need_dweight and (H == 1 or one_range)
            dw = (
                dweight[:, classes].view(chunk.rows.shape)
                if whole
                else weight.new_empty(chunk.rows.shape)
                if need_dweight
                else empty
            )
            in_dw = one_image_range or not need_dweight or dw.dtype == call.wide
            total = dw if in_dw else dw.new_empty(dw.shape, dtype=call.wide)
            for part in call.parts(classes, chunk):
                mine = None if statistics is None else statistics[part.images]
                rows = row_loss[part.images] if statistics is None else None
                call.kernels.gradient(
                    part.z, None, call.place(part), a.images(part.images), call.factor, dout, rows, mine, any(needs)
                )
                if not any(needs):
                    continue
                dlogits = part.z[0].to(x.dtype)
                if need_dbias:
                    dbias[:, classes] += chunks.bias_gradient(dlogits, part.options, call.wide)
                if need_dx or need_dweight:
                    call.pooling.pool_backward(part.scores, chunk.scale, part.options, 0, dlogits, part.scores)
                    sums = dx if need_dx else None, total if need_dweight else None
                    chunks.add_gradients(part.scores, part.tokens, chunk, part.images, *sums)
            if need_dweight:
                chunks.through_the_norm(call.pooling, total, chunk)
                if total is not dw:
                    dw.copy_(total)
                if not whole:
                    dweight[:, classes] = dw.view(H, classes.stop - classes.start, D)
    loss = row_loss.sum() * call.factor
    dx = dx.to(x.dtype).view(B, L, D) if need_dx else empty.clone()
    if need_dweight and (like := empty_gradient(weight, True)).stride() != dweight.stride():
        dweight = like.copy_(dweight)
    return loss, dx, dweight if need_dweight else empty.clone(), dbias.to(x.dtype) if need_dbias else empty


class CsraLoss:
    """The launchers of csra_loss around a backend's kernels of pooling and of the loss."""

    def __init__(self, pooling: Pooling, kernels: LossKernels) -> None:
        self.pooling, self.kernels = pooling, kernels

    def _call(self, inputs: Sequence[Any]) -> _Call:
        x, weight, bias, temperatures, lam, normalize, average, *rest = inputs
        options = temperatures, lam, normalize, average
        return _Call(self.pooling, self.kernels, x, weight, bias, *options, LossArguments(*rest))

    def csra_loss(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the gradients that `make` asks for."""
        call = self._call(inputs)
        return run(call, None, call.a.make)

    def csra_loss_backward(self, dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients (dx, dweight, dbias) for the upstream gradient dout."""
        *inputs, needs = arguments
        return run(self._call(inputs), dout, needs)[1:]
