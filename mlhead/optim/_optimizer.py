"""What the optimizers have in common: options, checks, states, and when a step begins and ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

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
          divided by it. `scaler.step` must not get the optimizer (an AssertionError of torch, as it finds no gradient):
          call its own `step()`. Better take bf16.
        * `torch.autograd.grad` of such a loss updates the weight too, whatever of the loss's inputs it is asked for.
        * One product more: forward computes the loss alone, and backward the logits again, 4 products instead of 3
          (with softmax 5 instead of 4).
        * Data parallelism: nothing averages the gradients of several processes, whose copies of the weight would drift
          apart. Heads sharded by `parallelize_head` are not supported.
        * torch.compile runs forward and backward of the loss as it would without compiling (a graph break, which is an
          error with fullgraph=True).

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
        TypeError: A parameter is no floating tensor, `block_numbers` or `seed` no integer, or another option no number.
    """

    # States that begin when they are first needed, perhaps after the first step; of the parameter's shape.
    later_states: ClassVar[tuple[str, ...]] = ("compensation",)

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
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            self._fail("seed", "an integer", type(group["seed"]).__name__, TypeError)
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
            hint = "another tensor (after head.reset() or a copy, make the optimizer anew)"
            _check.fail(where, "weight", "itself one of the parameters of `update`", hint)
        before = self.state.get(parameter, {}).get("num_classes", num_classes)
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
        blocks = self._blocks(parameter, num_classes, most)
        if not state:
            state.update(step=torch.tensor(0.0), num_classes=num_classes, block_numbers=most)
        makers = dict(self.new_states(group, parameter, len(blocks)))
        if group["rounding"] == "kahan" and wide_dtype(parameter.dtype) != parameter.dtype:
            makers["compensation"] = self._zeros(parameter, parameter.dtype)
        new = {name: make() for name, make in makers.items() if name not in state}
        state.update(new)
        state["step"] += 1
        self._updated.add(id(parameter))
        return BlockPass(self, group, parameter, number, blocks, dtype, frozenset(new))

    @staticmethod
    def _blocks(parameter: Tensor, num_classes: int, most: int) -> tuple[Block, ...]:
        G, E, J = grouped(parameter).shape
        return plan_blocks(G, E, J, num_classes, max(1, most // max(E, 64)), most)

    @staticmethod
    def _zeros(parameter: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What makes zeros of the shape of a parameter."""
        dtype = torch.promote_types(dtype, parameter.dtype) if parameter.dtype == torch.float64 else dtype
        return lambda: torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)

    @abstractmethod
    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Callable[[], Tensor]]:
        """What makes each tensor that the arithmetic keeps between steps, as it is at the start."""

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

        Nothing is changed by a call that raises an error.

        Raises:
            ValueError: `state_dict` is of another optimizer or another weight: the numbers of groups or of parameters
                in a group differ, an option or a state is missing, unknown, or of another shape.
            TypeError: `state_dict` is no dictionary, or one of its options is of a wrong type.
        """
        parameters = self._check_state_dict(state_dict)
        super().load_state_dict({**state_dict, "state": {}})
        for i, parameter in parameters.items():
            if state_dict["state"].get(i):
                self.state[parameter] = {
                    name: self._loaded(name, value, parameter) for name, value in state_dict["state"][i].items()
                }

    def _check_state_dict(self, state_dict: Any) -> dict[Any, Tensor]:
        """The parameter of each number in a state dict, all of which fits this optimizer."""
        if not isinstance(state_dict, dict):
            self._fail("state_dict", "a dictionary", type(state_dict).__name__, TypeError)
        if not {"state", "param_groups"} <= state_dict.keys():
            self._fail("state_dict", "a dictionary with 'state' and 'param_groups'", sorted(map(str, state_dict)))
        saved = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        found = [len(group.get("params", ())) for group in saved]
        if found != sizes:
            self._fail("state_dict", f"of groups with {sizes} parameters", found)
        parameters = {}
        for group, theirs in zip(self.param_groups, saved, strict=True):
            options = [name for name in self.defaults if name != "differentiable"]  # which torch adds as it loads
            missing = [name for name in options if name not in theirs]
            if missing:
                must = f"with the options {', '.join(options)} in each group, as of {type(self).__name__}"
                self._fail("state_dict", must, f"a group without {', '.join(missing)}")
            try:
                self._check_group({**theirs, "params": group["params"]})
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error} in state_dict") from None
            for i, parameter in zip(theirs["params"], group["params"], strict=True):
                parameters[i] = parameter
                if state_dict["state"].get(i):
                    self._check_state(i, state_dict["state"][i], theirs, parameter)
        return parameters

    def _check_state(self, i: Any, state: dict[str, Any], group: dict[str, Any], parameter: Tensor) -> None:
        """That the saved state `i` is one of this optimizer for a parameter of this shape."""
        what, (G, _, J) = f"state_dict['state'][{i!r}]", grouped(parameter).shape
        of = f"as of {type(self).__name__} for a weight {tuple(parameter.shape)}"
        names = ("step", "num_classes", "block_numbers")
        meta = torch.empty_like(parameter, device="meta")
        kept = self.new_states(group, meta, 0).keys() - set(self.later_states)
        missing = [name for name in (*names, *sorted(kept)) if name not in state]
        unknown = [str(name) for name in state if name not in (*names, *kept, *self.later_states)]
        if missing or unknown:
            got = f"without {', '.join(missing)}" if missing else f"with {', '.join(unknown)}"
            allowed = ", ".join((*names, *sorted(kept)))
            self._fail(what, f"of {allowed}, perhaps {', '.join(self.later_states)}, {of}", f"one {got}")
        for name in names[1:]:
            if isinstance(state[name], bool) or not isinstance(state[name], int) or state[name] < 0:
                self._fail(f"{what}[{name!r}]", "an integer of at least 0", repr(state[name]))
        C = state["num_classes"]
        if parameter.ndim == 2 and C != J:
            self._fail(f"{what}['num_classes']", f"{J}, {of}", C)
        if C > G * J or not (J == -(-C // max(G, 1)) or (G - 1) * J < C):  # as of group_fc
            self._fail(f"{what}['num_classes']", f"of {G} groups of {J} classes, {of}", C)
        blocks = self._blocks(parameter, C, max(1, state["block_numbers"]))
        shapes = {name: make().shape for name, make in self.new_states(group, meta, len(blocks)).items()}
        shapes.update(dict.fromkeys(self.later_states, parameter.shape), step=torch.Size())
        for name, shape in shapes.items():
            value = state.get(name)
            fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
            if name in state and not fits:
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                self._fail(f"{what}[{name!r}]", f"a floating tensor {tuple(shape)}, {of}", got)

    @staticmethod
    def _loaded(name: str, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device="cpu" if name == "step" else parameter.device, copy=True)
