"""Stochastic gradient descent, with momentum and Nesterov's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _check
from ..ops._loss_chunks import Block
from ._blocks import BlockPass
from ._optimizer import ClassOptimizer, Rounding


class ClassSGD(ClassOptimizer):
    """`torch.optim.SGD`, inside backward; see `ClassOptimizer` for what that costs.

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        lr: Learning rate.
        momentum: Needs a tensor of the weight's shape.
        dampening: Of momentum.
        weight_decay: Added to the gradient, times the weight.
        nesterov: Nesterov's momentum.
        rounding, state_dtype, seed, block_numbers: As for `ClassOptimizer`.

    Raises:
        ValueError: An option or the shape of a parameter does not fit; the message names it.
        TypeError: A parameter is no floating tensor, `block_numbers` or `seed` no integer, or another option no number.
    """

    later_states: ClassVar[tuple[str, ...]] = ("momentum_buffer", "compensation")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        rounding: Rounding = "nearest",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        block_numbers: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(
            params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed, block_numbers=block_numbers
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("momentum", "dampening"):
            _check.check_number(type(self).__name__, name, group[name])
        if not group["momentum"] >= 0:
            self._fail("momentum", "at least 0", group["momentum"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            self._fail("nesterov", "False without momentum or with dampening", True)

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Callable[[], Tensor]]:
        """The momentum."""
        return {"momentum_buffer": self._zeros(parameter, group["state_dtype"])} if group["momentum"] else {}

    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """One step of SGD."""
        group, momentum = run.group, run.group["momentum"]
        if group["weight_decay"] != 0:
            gradient.add_(weight, alpha=group["weight_decay"])
        if momentum != 0:
            stored = run.part("momentum_buffer", block)
            begins = "momentum_buffer" in run.new
            if begins:
                stored.copy_(gradient)
            buffer = run.widened("momentum", block, stored)
            if not begins:
                buffer.mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
                if buffer is not stored:
                    stored.copy_(buffer)
            gradient = gradient.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
        weight.add_(gradient, alpha=-float(group["lr"]))
