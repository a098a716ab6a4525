"""What the optimizers have in common: options, checks, states, and when a step begins and ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .. import _check
from ..ops._loss_chunks import Block, plan_blocks
from ..ops._loss_update import grouped
from ._blocks import BlockPass, block_numbers, wide_dtype

Rounding = Literal["nearest", "stochastic", "kahan"]

ROUNDINGS = ("nearest", "stochastic", "kahan")


class ClassOptimizer(Optimizer):
    """Base of the optimizers that update class weights inside backward.

    A step is one forward, one backward and `step()`. The backward of `head(features, targets, update=optimizer)`, or of
    `group_fc_loss` or `linear_loss` with `update=optimizer`, updates the weight by the learning rate of that moment;
    `step()` only ends the step, so that learning-rate schedulers and training loops find what they expect. Parameter
    groups, schedulers, hooks, `state_dict` and `load_state_dict` are those of `torch.optim`. All else, the bias too,
    has gradients as ever and needs an optimizer of its own.

    Not having the gradient costs:
        * No clipping by a norm over all gradients, which would have to be known before the first block is updated.
        * No accumulation: a second backward before `step()` is an error, also that of a sum of two losses of one
          weight, which is noticed when the first has updated the weight.
        * No second backward through a loss (`retain_graph`), no gradients of gradients, no torch.func.
        * No skipped steps: by the time GradScaler sees an infinity, the weight has it. Where a scaler is used for the
          rest of the model, set `optimizer.loss_scale = scaler.get_scale()` before each backward; the gradients are
          divided by it. Leave the optimizer out of `scaler.step`, and call its own `step()`. Better take bf16.
        * One product more: forward computes the loss alone, and backward the logits again, 4 products instead of 3
          (with softmax 5 instead of 4).
        * Data parallelism: nothing averages the gradients of several processes, whose copies of the weight would drift
          apart. Heads sharded by `parallelize_head` are not supported.
        * torch.compile runs forward and backward of the loss as it would without compiling (a graph break).

    Under autocast, where weight and features have different dtypes, forward makes a whole copy of the weight in
    autocast's dtype; a weight that has this dtype itself is not copied.

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        defaults: The options of the arithmetic.
        rounding: How a 16-bit weight is stored; the arithmetic is in fp32 always. "nearest" loses an update below half
            a unit of the weight. "stochastic", for bf16, rounds up or down at random, so that the mean is right.
            "kahan" keeps what rounding left over in a second tensor of the weight's shape and dtype. Wider weights
            are not rounded.
        state_dtype: Of momentum and of AdamW's first moment. Second moments are wide always, as in 16 bits 0.999 of a
            number rounds to that number. fp64 weights have fp64 states.
        seed: Of stochastic rounding. Which random numbers a step takes depends on it, the step and the block only, so a
            resumed run repeats one that went through.
        block_numbers: The most numbers of a weight that are updated at a time, give or take 16 classes; by default a
            128th of the weight, at least 2^18, on a CPU at most 2^20, on a GPU 2^23. Temporaries take up to 20 bytes
            for each. Fixed from a parameter's first update on, in `state_dict` too.

    Attributes:
        loss_scale: What the loss was multiplied by before backward, a number or a scalar tensor; 1 by default. Not part
            of `state_dict`.

    Raises:
        ValueError: An option or the shape of a parameter does not fit, there is no parameter, or one is in two groups.
        TypeError: A parameter is no floating tensor, `block_numbers` no integer, or another option no number.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        rounding: Rounding,
        state_dtype: torch.dtype,
        seed: int,
        block_numbers: int | None,
    ) -> None:
        options = {"rounding": rounding, "state_dtype": state_dtype, "seed": seed, "block_numbers": block_numbers}
        self.loss_scale: float | Tensor = 1.0
        self._updated: set[int] = set()
        super().__init__(params, {**defaults, **options})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loss_scale = getattr(self, "loss_scale", 1.0)
        self._updated = set()

    def _fail(self, argument: str, must: str, got: Any, error: type[Exception] = ValueError) -> None:
        _check.fail(type(self).__name__, argument, must, got, error)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `torch.optim.Optimizer`, with checks; a group that fails them is not added.

        Raises:
            ValueError: As at construction.
            TypeError: As at construction, or the group is no dictionary.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[before:]
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        where = type(self).__name__
        _check.check_choice(where, "rounding", group["rounding"], ROUNDINGS)
        if group["state_dtype"] not in (torch.float32, torch.bfloat16):
            self._fail("state_dtype", "torch.float32 or torch.bfloat16", group["state_dtype"])
        if group["block_numbers"] is not None:
            _check.check_positive(where, "block_numbers", group["block_numbers"])
        for name in ("lr", "weight_decay"):
            _check.check_number(where, name, group[name])
            if not group[name] >= 0:
                self._fail(name, "at least 0", group[name])
        for parameter in group["params"]:
            _check.check_tensor(where, "params", parameter)
            if parameter.ndim not in (2, 3):
                self._fail("params", "(G, E, J) or (C, D) each", tuple(parameter.shape))
            if group["rounding"] == "stochastic" and parameter.dtype == torch.float16:
                self._fail("rounding", "'nearest' or 'kahan' for fp16 weights", "'stochastic', which is for bf16")

    def _find(self, parameter: Tensor) -> tuple[int, dict[str, Any]] | None:
        """The number of a parameter among all, and its group."""
        number = 0
        for group in self.param_groups:
            for own in group["params"]:
                if own is parameter:
                    return number, group
                number += 1
        return None

    def check_update(self, where: str, parameter: Tensor, num_classes: int) -> None:
        """That `parameter` is one of the optimizer's and had the same C in earlier steps.

        Raises:
            ValueError: It is not, or C was another.
        """
        if self._find(parameter) is None:
            _check.fail(where, "weight", "itself one of the parameters of `update`", "another tensor")
        before = self.state[parameter]["num_classes"] if parameter in self.state else num_classes
        if num_classes != before:
            _check.fail(where, "num_classes", f"{before}, as in earlier steps with `update`", num_classes)

    def check_backward(self, parameter: Tensor) -> None:
        """That the parameter was not yet updated in this step.

        Raises:
            RuntimeError: It was.
        """
        if id(parameter) in self._updated:
            raise RuntimeError(
                f"{type(self).__name__}: step() must be called between two backward passes, got a second one: "
                f"gradients cannot be accumulated where each backward updates the weight (gradient fusion)"
            )

    def begin_update(self, parameter: Tensor, num_classes: int, dtype: torch.dtype) -> BlockPass:
        """Begins the update of a parameter by gradients of `dtype`, and counts the step."""
        found = self._find(parameter)
        assert found is not None, "checked in forward"
        number, group = found
        state = self.state[parameter]
        most = state.get("block_numbers") or group["block_numbers"]
        most = most or block_numbers(parameter.numel(), parameter.device.type)
        G, E, J = grouped(parameter).shape
        blocks = plan_blocks(G, E, J, num_classes, max(1, most // max(E, 64)), most)
        if not state:
            state.update(step=torch.tensor(0.0), num_classes=num_classes, block_numbers=most)
            if group["rounding"] == "kahan" and wide_dtype(parameter.dtype) != parameter.dtype:
                state["compensation"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state.update(self.new_states(group, parameter, len(blocks)))
        state["step"] += 1
        self._updated.add(id(parameter))
        return BlockPass(self, group, parameter, number, blocks, dtype)

    @staticmethod
    def _like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros of the shape of a parameter."""
        dtype = torch.promote_types(dtype, parameter.dtype) if parameter.dtype == torch.float64 else dtype
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    @abstractmethod
    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Tensor]:
        """What the arithmetic keeps between steps, at the start."""

    @abstractmethod
    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """Updates a block (g, E, n) of the weight in place; it and the gradient, which may be overwritten, are wide."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Ends the step whose backward has updated the weights; applies nothing itself.

        Args:
            closure: Computes the loss and its gradients once more, as for `torch.optim`.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: There was no backward since the last step, or a weight has a gradient that did not come
                through `update=` and would be ignored.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        name = type(self).__name__
        if any(parameter.grad is not None for group in self.param_groups for parameter in group["params"]):
            raise RuntimeError(
                f"{name}: a weight must be used through `update=` only, got one with a gradient, which nothing applies"
            )
        if not self._updated:
            raise RuntimeError(
                f"{name}: step() must follow a backward of a loss with `update=`, got none since the last"
            )
        self._updated.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `torch.optim.Optimizer`, but each state keeps its own dtype, and is copied.

        Raises:
            ValueError: The numbers of groups, or of parameters in a group, differ.
        """
        super().load_state_dict({**state_dict, "state": {}})
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            if i in state_dict["state"]:
                self.state[parameter] = {
                    name: self._loaded(name, value, parameter) for name, value in state_dict["state"][i].items()
                }

    @staticmethod
    def _loaded(name: str, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device="cpu" if name == "step" else parameter.device, copy=True)
