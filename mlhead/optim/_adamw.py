"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _check
from ..ops._loss_chunks import Block
from ._blocks import BlockPass
from ._optimizer import ClassOptimizer, Rounding


class ClassAdamW(ClassOptimizer):
    """`torch.optim.AdamW`, inside backward; see `ClassOptimizer` for what that costs.

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        lr: Learning rate.
        betas: Of the two moments, each of which needs a tensor of the weight's shape.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        rounding, state_dtype, seed, block_numbers: As for `ClassOptimizer`.

    Raises:
        ValueError: An option or the shape of a parameter does not fit; the message names it.
        TypeError: A parameter is no floating tensor, `block_numbers` or `seed` no integer, or another option no number,
            or `betas` no pair of them.

    Source:
        Loshchilov and Hutter, Decoupled weight decay regularization (2019).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rounding: Rounding = "nearest",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        block_numbers: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed, block_numbers=block_numbers
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check.check_pair(type(self).__name__, "betas", group["betas"])
        for beta in group["betas"]:
            _check.check_probability(type(self).__name__, "betas", beta)
        _check.check_number(type(self).__name__, "eps", group["eps"])
        if not group["eps"] >= 0:
            self._fail("eps", "at least 0", group["eps"])

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Callable[[], Tensor]]:
        """The two moments."""
        return {
            "exp_avg": self._zeros(parameter, group["state_dtype"]),
            "exp_avg_sq": self._zeros(parameter, torch.float32),
        }

    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """One step of AdamW."""
        (beta1, beta2), lr, eps = run.group["betas"], float(run.group["lr"]), run.group["eps"]
        if run.group["weight_decay"] != 0:
            weight.mul_(1 - lr * run.group["weight_decay"])
        stored = run.part("exp_avg", block)
        first = run.widened("exp_avg", block, stored).lerp_(gradient, 1 - beta1)
        if first is not stored:
            stored.copy_(first)
        second = run.part("exp_avg_sq", block).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.sqrt(second, out=gradient).div_((1 - beta2**run.step) ** 0.5).add_(eps)
        weight.addcdiv_(first, root, value=-lr / (1 - beta1**run.step))
