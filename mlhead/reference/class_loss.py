"""Losses of logits (B, C), element by element, and their closed-form gradients: the oracle of the loss in the head.

BCE     l = pos_weight_c y softplus(-z) + (1 - y) softplus(z)
ASL     l = -( y q^gp log max(p, eps) + (1 - y) pm^gn log max(1 - pm, eps) ),  p = sigmoid(z), q = 1 - p, pm = (p - m)+
softmax l = sum_c' v_c' (lse - z_c'),  v_c = class_weight_c y_c,  lse = log sum_c exp z_c

Each is multiplied by class_weight_c and by sample_weight_b. Targets are dense, y (B, C), or sparse: row b's are at
`indices[offsets[b] : offsets[b + 1]]` with the values there, or 1, and y is 0 elsewhere. A negative y marks an element
that is ignored: no loss, no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.fx.experimental.proxy_tensor import get_proxy_mode

CHUNK = 1 << 19  # logits that exist at a time: a few megabytes with all that is made of them

# What every loss op takes behind its own arguments, as a schema and, in the same order, as `LossArguments`.
SCHEMA = (
    "Tensor targets, Tensor? offsets, Tensor? values, Tensor? class_weight, Tensor? pos_weight, Tensor? sample_weight, "
    "SymInt num_classes, str loss, float gamma_neg, float gamma_pos, float margin, float eps, bool detach_focal, "
    "float label_smoothing, str reduction, str class_group, bool[] make"
)


class LossArguments(NamedTuple):
    """What every loss op takes besides its head's arguments.

    Args:
        targets: Dense y (B, C) of any real dtype, or with `offsets` the classes (N) of all rows, int64, each row's in
            ascending order.
        offsets: None, or (B + 1) int64.
        values: y of the sparse targets, (N) in the accumulation dtype; None for 1.
        class_weight: (C) in the accumulation dtype, or None.
        pos_weight: (C) likewise, for BCE.
        sample_weight: (B) likewise.
        num_classes: C.
        loss: "bce", "asl" or "softmax"; what follows are the options of these.
        reduction: "sum", or "mean": over B * C, for softmax over B.
        class_group: For "softmax" the name of a process group whose members each have a part of the classes, or "".
        make: Which gradients forward makes at once.
    """

    targets: Tensor
    offsets: Tensor | None
    values: Tensor | None
    class_weight: Tensor | None
    pos_weight: Tensor | None
    sample_weight: Tensor | None
    num_classes: int
    loss: str
    gamma_neg: float
    gamma_pos: float
    margin: float
    eps: float
    detach_focal: bool
    label_smoothing: float
    reduction: str
    class_group: str
    make: list[bool]

    def factor(self, B: int) -> float:
        """What the sum over all elements is multiplied by; a mean over nothing is 0."""
        if self.reduction == "sum":
            return 1.0
        elements = B if self.loss == "softmax" else B * self.num_classes
        return 1.0 / elements if elements else 0.0

    def dense(self, classes: slice, B: int, dtype: torch.dtype) -> Tensor:
        """Targets y (B, n) of a range of classes, negative where ignored."""
        if self.offsets is None:
            return self.targets[:, classes].to(dtype)
        n = classes.stop - classes.start
        entries = torch.arange(self.targets.shape[0], device=self.targets.device)
        row = torch.searchsorted(self.offsets, entries, right=True) - 1
        inside = (self.targets >= classes.start) & (self.targets < classes.stop) & (row >= 0) & (row < B)
        row = row.clamp(0, max(B - 1, 0))  # the offsets of a range of images leave out entries at both ends
        column = torch.where(inside, self.targets - classes.start, n)  # column n takes what is elsewhere
        y = torch.zeros(B, n + 1, dtype=dtype, device=self.targets.device)
        value = torch.ones((), dtype=dtype, device=y.device) if self.values is None else self.values.to(dtype)
        return y.index_put((row, column), value)[:, :n]

    def images(self, part: slice) -> LossArguments:
        """The arguments of a range of images."""
        if self.offsets is None:
            targets, offsets = self.targets[part], None
        else:
            targets, offsets = self.targets, self.offsets[part.start : part.stop + 1]
        weight = None if self.sample_weight is None else self.sample_weight[part]
        return self._replace(targets=targets, offsets=offsets, sample_weight=weight)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), exact for large |z| too, with a derivative at 0 too."""
    return -F.logsigmoid(-z)


def _power(base: Tensor, gamma: float, detach: bool) -> Tensor:
    base = base.detach() if detach else base
    if gamma < 1 and not detach:  # a finite gradient at 0 too
        base = base.clamp(min=torch.finfo(base.dtype).tiny)
    return base**gamma


def _log_rest(pm: Tensor, q: Tensor, a: LossArguments) -> Tensor:
    """log(max(1 - pm, eps)), exact where pm is small, which is nearly everywhere, and where it is near 1."""
    rest = (q + a.margin).clamp(max=1).clamp(min=a.eps)
    return torch.where(pm < 0.5, torch.log1p(-pm.clamp(max=0.5)), rest.log()).clamp(min=math.log(a.eps))


def _column(weight: Tensor | None, classes: slice) -> Tensor | float:
    return 1.0 if weight is None else weight[classes]


def _row(weight: Tensor | None) -> Tensor | float:
    return 1.0 if weight is None else weight[:, None]


def element_loss(z: Tensor, classes: slice, a: LossArguments) -> Tensor:
    """The BCE or ASL (B, n) of logits z (B, n), weighted, not reduced."""
    y = a.dense(classes, z.shape[0], z.dtype)
    counts, y = y >= 0, y.clamp(min=0)
    if a.loss == "bce":
        y = y * (1.0 - a.label_smoothing) + 0.5 * a.label_smoothing
        loss = _column(a.pos_weight, classes) * y * _softplus(-z) + (1.0 - y) * _softplus(z)
    else:
        p, q = torch.sigmoid(z), torch.sigmoid(-z)  # q = 1 - p without cancellation
        pm = (p - a.margin).clamp(min=0)
        positive = F.logsigmoid(z).clamp(min=math.log(a.eps)) * (
            _power(q, a.gamma_pos, a.detach_focal) if a.gamma_pos > 0 else 1.0
        )
        negative = _log_rest(pm, q, a) * (_power(pm, a.gamma_neg, a.detach_focal) if a.gamma_neg > 0 else 1.0)
        loss = -(y * positive + (1.0 - y) * negative)
    return torch.where(counts, loss, 0.0) * _column(a.class_weight, classes) * _row(a.sample_weight)


def element_gradient(z: Tensor, classes: slice, a: LossArguments) -> Tensor:
    """The derivative of `element_loss` by z, in closed form."""
    y = a.dense(classes, z.shape[0], z.dtype)
    counts, y = y >= 0, y.clamp(min=0)
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    if a.loss == "bce":
        y = y * (1.0 - a.label_smoothing) + 0.5 * a.label_smoothing
        weighted = _column(a.pos_weight, classes) * y
        dz = (1.0 - y) * p - weighted * q
    else:
        log_p, log_eps = F.logsigmoid(z), math.log(a.eps)
        base = (p - a.margin).clamp(min=0)
        rest = (q + a.margin).clamp(max=1).clamp(min=a.eps)
        focal_p = _power(q, a.gamma_pos, a.detach_focal) if a.gamma_pos > 0 else torch.ones_like(q)
        focal_n = _power(base, a.gamma_neg, a.detach_focal) if a.gamma_neg > 0 else torch.ones_like(q)
        positive = torch.where(log_p >= log_eps, focal_p * q, 0.0)
        inside = (q + a.margin <= 1) & (q + a.margin >= a.eps)
        negative = torch.where(inside, -focal_n * p * q / rest, 0.0)
        if not a.detach_focal and a.gamma_pos > 0:
            positive = positive - a.gamma_pos * log_p.clamp(min=log_eps) * focal_p * p
        if not a.detach_focal and a.gamma_neg > 0:
            log_rest = _log_rest(base, q, a)
            tiny = torch.finfo(z.dtype).tiny
            slope = torch.where(base > tiny, a.gamma_neg * base.clamp(min=tiny) ** (a.gamma_neg - 1.0), 0.0)
            negative = negative + slope * log_rest * p * q
        dz = torch.where(z.isnan(), z, -(y * positive + (1.0 - y) * negative))
    return torch.where(counts, dz, 0.0) * _column(a.class_weight, classes) * _row(a.sample_weight)


def _softmax_targets(classes: slice, B: int, a: LossArguments, dtype: torch.dtype) -> Tensor:
    """Smoothed targets times the weights of their classes."""
    y = a.dense(classes, B, dtype) * (1.0 - a.label_smoothing) + a.label_smoothing / a.num_classes
    return y * _column(a.class_weight, classes)


class SoftmaxRows(NamedTuple):
    """What the softmax of each row needs of all classes: lse (B), sum of v (B), sum of v z (B)."""

    lse: Tensor
    total: Tensor
    score: Tensor


def softmax_rows(logits: Callable[[slice], Tensor], ranges: Iterable[slice], B: int, a: LossArguments) -> SoftmaxRows:
    """One pass over all ranges of classes; `logits` makes those of a range in the accumulation dtype."""
    parts = []
    for classes in ranges:
        z = logits(classes)
        v = _softmax_targets(classes, B, a, z.dtype)
        parts.append((torch.logsumexp(z, 1), v.sum(1), (v * z).sum(1)))
    lse, total, score = (torch.stack(column) for column in zip(*parts, strict=True))
    return SoftmaxRows(torch.logsumexp(lse, 0), total.sum(0), score.sum(0))


def add_shards(statistics: Tensor, class_group: str) -> None:
    """Takes the classes of the other members of a process group into softmax's numbers of each row (B, 4), in place.

    They are (max z, sum exp(z - max), sum v z, sum v). Every member calls this at the same point; "" is no group.
    """
    if not class_group:
        return
    if statistics.requires_grad:
        raise RuntimeError("softmax over the shards of a class group has no gradient of its gradient")
    find: Callable[[str], Any] = distributed.distributed_c10d._resolve_process_group  # type: ignore[assignment]
    group = find(class_group)
    largest = statistics[:, 0].clone()
    distributed.all_reduce(largest, distributed.ReduceOp.MAX, group)
    # A member without classes has -inf, and adds nothing.
    statistics[:, 1] *= torch.exp(statistics[:, 0] - torch.where(largest.isinf(), 0.0, largest))
    sums = statistics[:, 1:].contiguous()
    distributed.all_reduce(sums, distributed.ReduceOp.SUM, group)
    statistics[:, 0], statistics[:, 1:] = largest, sums


def _all_softmax_rows(
    logits: Callable[[slice], Tensor], ranges: Iterable[slice], B: int, a: LossArguments
) -> SoftmaxRows:
    """As `softmax_rows`, over the classes of all members of the class group."""
    rows = softmax_rows(logits, ranges, B, a)
    if not a.class_group:
        return rows
    statistics = torch.stack((rows.lse, torch.ones_like(rows.lse), rows.score, rows.total), 1)
    add_shards(statistics, a.class_group)
    return SoftmaxRows(statistics[:, 0] + statistics[:, 1].log(), statistics[:, 3], statistics[:, 2])


def softmax_gradient(z: Tensor, classes: slice, rows: SoftmaxRows, a: LossArguments) -> Tensor:
    """The derivative dz (B, n) = (sum v) softmax(z) - v, times the weight of the row."""
    v = _softmax_targets(classes, z.shape[0], a, z.dtype)
    return (rows.total[:, None] * torch.exp(z - rows.lse[:, None]) - v) * _row(a.sample_weight)


def reduced(logits: Callable[[slice], Tensor], ranges: list[slice], B: int, a: LossArguments) -> Tensor:
    """The loss of all ranges of classes, a scalar."""
    if a.loss == "softmax":
        rows = _all_softmax_rows(logits, ranges, B, a)
        per_row = rows.total * rows.lse - rows.score
        total = (per_row if a.sample_weight is None else per_row * a.sample_weight).sum()
    else:
        total = torch.stack([element_loss(logits(classes), classes, a).sum() for classes in ranges]).sum()
    # Of a number times a Python one torch's forward mode makes an fp64 tangent; of a vector it does not.
    return (total.view(1) * a.factor(B)).squeeze(0)


def logit_gradients(
    dout: Tensor, logits: Callable[[slice], Tensor], ranges: list[slice], B: int, a: LossArguments
) -> Iterable[tuple[slice, Tensor]]:
    """Each range of classes with the gradient dz (B, n) of its logits."""
    rows = _all_softmax_rows(logits, ranges, B, a) if a.loss == "softmax" else None
    for classes in ranges:
        z = logits(classes)
        dz = element_gradient(z, classes, a) if rows is None else softmax_gradient(z, classes, rows, a)
        yield classes, dz * (dout.to(z.dtype) * a.factor(B))


def may_chunk(*sizes: int) -> bool:
    """Whether ranges of classes may be gone through one by one: not under torch.func, with symbolic sizes, or where a
    graph is made, which must not write in place.
    """
    if not all(type(n) is int for n in sizes) or torch._C._functorch.maybe_current_level() is not None:
        return False
    return not torch._C._len_torch_dispatch_stack() or get_proxy_mode() is None
