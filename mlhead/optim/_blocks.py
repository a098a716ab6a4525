"""How large the blocks of a weight are, and one update of a weight, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops._loss_chunks import Block
from ..ops._loss_update import grouped

if TYPE_CHECKING:
    from ._optimizer import ClassOptimizer

_FEWEST = 1 << 18
BYTES_OF_A_NUMBER = 20  # the most that a block's temporaries take for each of its numbers
# Assumed for an H100; on a CPU a few MiB, which stay in the cache. Neither is tuned.
_MOST = {"cpu": 1 << 20, "cuda": 1 << 23}


def block_numbers(numel: int, device_type: str) -> int:
    """The most numbers of a block, by default: few beside the weight, enough to be worth the launches."""
    most = _MOST.get(device_type, _MOST["cuda"])
    return max(_FEWEST, min(most, numel // 128))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mix(*numbers: int) -> int:
    """A seed of 64 bits from several numbers (the finalizer of splitmix64)."""
    mask, z = (1 << 64) - 1, 0
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z


class BlockPass:
    """One update of one parameter, block by block: the sink of `loss_and_gradients`.

    Args:
        optimizer: Whose arithmetic it is.
        group: The parameter's options.
        parameter: (G, E, J) or (C, D).
        number: Of the parameter among all of the optimizer's.
        blocks: All of them.
        dtype: Of the gradient.
        new: The names of the states that begin with this update.
    """

    def __init__(
        self,
        optimizer: ClassOptimizer,
        group: dict[str, Any],
        parameter: Tensor,
        number: int,
        blocks: tuple[Block, ...],
        dtype: torch.dtype,
        new: frozenset[str],
    ) -> None:
        self.optimizer, self.group, self.blocks, self.dtype, self.new = optimizer, group, blocks, dtype, new
        self.state: dict[str, Any] = optimizer.state[parameter]
        self.weight = grouped(parameter)
        self.wide = wide_dtype(parameter.dtype)
        self.step = int(self.state["step"])
        self._number, self._is_rows = number, parameter.ndim == 2
        self._order = {block.first: i for i, block in enumerate(blocks)}
        sizes = [self._shape(block) for block in blocks]
        self._most = max((g * E * n for g, E, n in sizes), default=0)
        self._spare: dict[str, Tensor] = {}

    def _shape(self, block: Block) -> tuple[int, int, int]:
        groups, columns = block.groups, block.columns
        return groups.stop - groups.start, self.weight.shape[1], columns.stop - columns.start

    def spare(self, name: str, block: Block, dtype: torch.dtype | None = None) -> Tensor:
        """Memory (g, E, n) in the layout of the weight, the same for each block; by default wide."""
        if name not in self._spare:
            self._spare[name] = self.weight.new_empty(self._most, dtype=dtype or self.wide)
        g, E, n = self._shape(block)
        flat = self._spare[name][: g * E * n]
        return flat.view(g, n, E).transpose(1, 2) if self._is_rows else flat.view(g, E, n)

    def part(self, name: str, block: Block) -> Tensor:
        """The block (g, E, n) of a state of the parameter's shape, in its own dtype."""
        return grouped(self.state[name])[block.groups, :, block.columns]

    def widened(self, name: str, block: Block, tensor: Tensor) -> Tensor:
        """The tensor itself if it is wide, else a copy that is."""
        return tensor if tensor.dtype == self.wide else self.spare(name, block).copy_(tensor)

    def order(self, block: Block) -> int:
        """Which of the blocks it is."""
        return self._order[block.first]

    def place(self, block: Block) -> Tensor:
        """Where the block's gradient (g, E, n) is to be written."""
        return self.spare("gradient", block, self.dtype)

    @torch.no_grad()
    def done(self, block: Block, gradient: Tensor) -> None:
        """Updates the block of the weight by its gradient."""
        stored = self.weight[block.groups, :, block.columns]
        gradient = self.widened("wide gradient", block, gradient)
        scale = self.optimizer.loss_scale
        if isinstance(scale, Tensor) or scale != 1.0:
            gradient.div_(scale)
        weight = self.widened("weight", block, stored)
        rounding = self.group["rounding"] if weight is not stored else "nearest"
        compensation = self.part("compensation", block) if rounding == "kahan" else None
        if compensation is not None:
            weight.add_(compensation)
        self.optimizer.update_block(self, block, weight, gradient)
        if weight is stored:
            return
        if rounding == "stochastic":
            self._round_stochastically(block, weight)
        stored.copy_(weight)
        if compensation is not None:
            compensation.copy_(weight.sub_(stored))

    def _round_stochastically(self, block: Block, weight: Tensor) -> None:
        """Random numbers below one unit of bf16 are added to the bits of fp32, and what is left of a unit cut off."""
        generator = torch.Generator(weight.device)
        generator.manual_seed(_mix(self.group["seed"], self._number, self.step, self.order(block)))
        n = weight.numel()
        if "random" not in self._spare:
            self._spare["random"] = weight.new_empty(-(-self._most // 4), dtype=torch.int64)
        # Four 16-bit numbers from each 64-bit one.
        random = self._spare["random"][: -(-n // 4)].random_(-(1 << 63), None, generator=generator)
        nan = weight.isnan()  # adding to the bits of a NaN may make a zero of it
        bits = self._spare["weight"][:n].view(torch.int32)
        bits.add_(random.view(torch.int16)[:n]).add_(1 << 15).bitwise_and_(-(1 << 16))
        weight.masked_fill_(nan, torch.nan)
