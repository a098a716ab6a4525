"""group_fc_loss a block of classes at a time: products by torch (the vendor's library), the loss by a kernel.

A block is a range of whole groups, or of the classes of one group, whose logits z, weight and weight's gradient stay in
the cache between the four steps:

    z  = h W + bias                    into a scratch of constant size
    z -> loss and dz, in place         kernels of the backend (see _loss_kernels.py)
    dW = h^T dz                        written once, where it belongs
    dh += dz W^T                       W is still in the cache; summed in fp32 where a group is cut

so the weight is read once from memory, its gradient is written once, and neither the (B, C) logits nor their gradient
nor a dense target exist. Softmax needs a first pass for its log-sum-exp, unless one block has all classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.class_loss import LossArguments, accumulation, add_shards
from ._csra_chunks import add_product
from ._gradients import empty_gradient
from ._loss_kernels import ExtensionKernels, LossKernels, Place


@dataclass(frozen=True)
class Sizes:
    """What a block is chosen by.

    Args:
        logit_bytes: The most bytes of its logits.
        weight_bytes: The most bytes of its part of the weight.
    """

    logit_bytes: int
    weight_bytes: int


SIZES = {
    "cpu": Sizes(2 << 20, 4 << 20),
    # Assumed for an H100, whose L2 holds 50 MB; not yet measured on a GPU.
    "cuda": Sizes(24 << 20, 24 << 20),
}


class Block(NamedTuple):
    """Groups and, of each, columns; `first` is the class of the first column of the first group."""

    groups: slice
    columns: slice
    first: int


@lru_cache(maxsize=256)
def plan_blocks(G: int, E: int, J: int, C: int, most_logits: int, most_weights: int) -> tuple[Block, ...]:
    """Blocks that cover every class once, in order; none holds a class that does not exist."""
    columns = max(1, min(J, most_logits, most_weights // max(E, 1))) if J else 0
    whole, blocks = (C // J if J else 0), []
    if columns == J and J:
        step = max(1, min(most_logits // J, most_weights // max(E * J, 1)))
        step = math.ceil(whole / math.ceil(whole / step)) if whole else 1
        blocks = [Block(slice(g, min(g + step, whole)), slice(0, J), g * J) for g in range(0, whole, step)]
        cut = [whole] if whole * J < C else []
    else:
        cut = list(range(whole + (whole * J < C))) if J else []
    for g in cut:
        size = min(J, C - g * J)
        parts = math.ceil(size / columns)
        step = -(-math.ceil(size / parts) // 16) * 16  # rows of the weight's blocks stay aligned
        for j in range(0, size, step):
            blocks.append(Block(slice(g, g + 1), slice(j, min(j + step, size)), g * J + j))
    return tuple(blocks)


def blocks_of(h: Tensor, weight: Tensor, C: int) -> tuple[Block, ...]:
    """The blocks of a call; a function of shapes, dtype and kind of device."""
    sizes = SIZES["cuda" if h.device.type == "cuda" else "cpu"]
    (B, G, E), J, size = h.shape, weight.shape[2], h.element_size()
    return plan_blocks(G, E, J, C, max(1, sizes.logit_bytes // (size * max(B, 1))), sizes.weight_bytes // size)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Sets out = a b for matrices of several groups (g, m, k), (g, k, n), or of one."""
    if a.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


class WeightGradient:
    """Where the gradient of the weight goes: whole into a tensor of the weight's layout."""

    def __init__(self, weight: Tensor, C: int) -> None:
        self.tensor = torch.empty_like(weight)
        J = weight.shape[2]
        whole = C // J if J else 0
        self.tensor[whole + (whole * J < C) :] = 0  # groups and columns without a class
        if whole * J < C:
            self.tensor[whole, :, C - whole * J :] = 0

    def place(self, block: Block) -> Tensor:
        """Where the block's gradient (g, E, n) is to be written."""
        return self.tensor[block.groups, :, block.columns]

    def done(self, block: Block, gradient: Tensor) -> None:
        """Called when the block's gradient is there and its weight not needed any more."""


class BlockCall:
    """One call: its blocks, and its logits one after another in the same memory."""

    def __init__(
        self,
        kernels: LossKernels,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: LossArguments,
        blocks: tuple[Block, ...] | None = None,
    ) -> None:
        self.kernels, self.h, self.weight, self.bias, self.a = kernels, h, weight, bias, a
        self.blocks = blocks_of(h, weight, a.num_classes) if blocks is None else blocks
        B = h.shape[0]
        self.wide = accumulation(h.dtype)
        most = max(
            ((b.groups.stop - b.groups.start) * (b.columns.stop - b.columns.start) for b in self.blocks), default=0
        )
        self.scratch = h.new_empty(B * most)
        self.factor = a.factor(B)
        self._at_hand = False  # whether the scratch still holds the logits of the only block

    def logits(self) -> Iterator[tuple[Block, Tensor, Tensor, Tensor, Place]]:
        """Each block with the inputs (g, B, E) and (g, E, n) of its product, its logits z (g, B, n) and their place."""
        B, J = self.h.shape[0], self.weight.shape[2]
        for block in self.blocks:
            h, weight = self.h[:, block.groups].transpose(0, 1), self.weight[block.groups, :, block.columns]
            g, n = h.shape[0], weight.shape[2]
            z = self.scratch[: g * B * n].view(g, B, n)
            if not self._at_hand:
                _product(h, weight, z)
            self._at_hand = False
            yield block, h, weight, z, Place(block.first, J, self.a.num_classes)

    def statistics(self) -> Tensor:
        """Softmax's numbers of each row over all classes, (B, 4)."""
        statistics = self.h.new_zeros(self.h.shape[0], 4, dtype=self.wide)
        statistics[:, 0] = -math.inf
        for _, _, _, z, place in self.logits():
            self.kernels.softmax_statistics(z, self.bias, place, self.a, statistics)
        self._at_hand = len(self.blocks) == 1
        return statistics


def softmax_rows_loss(statistics: Tensor, a: LossArguments) -> Tensor:
    """The sum of v (lse - z) of each row, (B,), weighted."""
    largest, total, score, weight = statistics.unbind(1)
    loss = weight * (largest + total.log()) - score
    return loss if a.sample_weight is None else loss * a.sample_weight


def loss_and_gradients(
    call: BlockCall, dout: Tensor | None, needs: Sequence[bool], sink: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and the gradients (dh, dweight, dbias) for an upstream gradient dout; those not needed are empty."""
    h, weight, a = call.h, call.weight, call.a
    B, G, E = h.shape
    need_dh, need_dweight, need_dbias = needs
    empty = h.new_empty(0)
    if need_dweight and sink is None:
        sink = WeightGradient(weight, a.num_classes)
    cut = any(block.columns.stop - block.columns.start < weight.shape[2] for block in call.blocks)
    # A group whose classes are not all in one block has its dh summed up.
    dh = h.new_empty((B, G, E), dtype=call.wide if cut else h.dtype) if need_dh else empty
    owned = call.blocks[-1].groups.stop if call.blocks else 0
    if need_dh:
        dh[:, owned:] = 0  # groups without a class
    dbias = h.new_empty(a.num_classes) if need_dbias else empty

    statistics, row_loss = None, h.new_zeros(B, dtype=call.wide)
    if a.loss == "softmax":
        statistics = call.statistics()
        add_shards(statistics, a.class_group)
        row_loss = softmax_rows_loss(statistics, a)
    add_to = row_loss if statistics is None else None
    for block, hb, wb, z, place in call.logits() if any(needs) or statistics is None else ():
        call.kernels.gradient(z, call.bias, place, a, call.factor, dout, add_to, statistics, any(needs))
        if need_dbias:
            dbias[block.first : block.first + z.shape[0] * z.shape[2]] = z.sum(1, dtype=call.wide).flatten()
        if need_dh:
            part = dh[:, block.groups].transpose(0, 1)
            if not cut:
                _product(z, wb.transpose(1, 2), part)
            else:
                for i in range(z.shape[0]):
                    add_product(part[i], z[i], wb[i].t(), block.columns.start == 0)
        if sink is not None and need_dweight:
            place_dw = sink.place(block)
            _product(hb.transpose(1, 2), z, place_dw)
            sink.done(block, place_dw)
    dweight = sink.tensor if need_dweight and isinstance(sink, WeightGradient) else empty.clone()
    return row_loss.sum() * call.factor, dh.to(h.dtype) if need_dh else empty.clone(), dweight, dbias


class _Launchers(ABC):
    """The launchers of group_fc_loss around one function that computes the loss and the gradients that are needed."""

    @abstractmethod
    def run(
        self,
        dout: Tensor | None,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: LossArguments,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the gradients (dh, dweight, dbias) for the upstream gradient dout, None for 1."""

    def group_fc_loss(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the gradients that `make` asks for."""
        a = LossArguments(*arguments)
        return self.run(None, h, weight, bias, a, a.make)

    def group_fc_loss_backward(
        self, dout: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients (dh, dweight, dbias) for the upstream gradient dout."""
        *rest, needs = arguments
        return self.run(dout, h, weight, bias, LossArguments(*rest), needs)[1:]


class Chunked(_Launchers):
    """Block by block around a backend's kernels."""

    def __init__(self, kernels: LossKernels) -> None:
        self.kernels = kernels

    def run(
        self,
        dout: Tensor | None,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: LossArguments,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_Launchers.run`."""
        return loss_and_gradients(BlockCall(self.kernels, h, weight, bias, a), dout, needs)


class CppPass(_Launchers):
    """The C++ backend, which makes the whole pass itself (group_fc_loss_cpu.cpp)."""

    def __init__(self, kernels: ExtensionKernels) -> None:
        self.kernels = kernels

    def run(
        self,
        dout: Tensor | None,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: LossArguments,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_Launchers.run`."""
        B, wide, factor = h.shape[0], accumulation(h.dtype), a.factor(h.shape[0])
        made = [
            empty_gradient(t, i == 1) if t is not None and need else None
            for i, (t, need) in enumerate(zip((h, weight, bias), needs, strict=True))
        ]
        head = (h, weight, bias, a.num_classes, *a[:6])
        options = self.kernels.options(a)
        run: Any = torch.ops.mlhead_C.group_fc_loss_pass.default
        statistics = None
        rows = h.new_zeros(B, dtype=wide)
        if a.loss == "softmax":
            statistics = h.new_empty(B, 4, dtype=wide)
            run(*head, *options, factor, None, None, statistics, None, None, None)
            add_shards(statistics, a.class_group)
            rows = softmax_rows_loss(statistics, a)
        if any(needs) or statistics is None:
            unused = rows if statistics is None else torch.empty_like(rows)
            run(*head, *options, factor, dout, statistics, unused, *made)
        empty = h.new_empty(0)
        return rows.sum() * factor, *(empty.clone() if t is None else t for t in made)  # type: ignore[return-value]
