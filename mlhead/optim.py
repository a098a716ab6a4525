"""Optimizers of class weights that work block by block inside backward (gradient fusion).

    optimizer = mlhead.optim.ClassAdafactor([head.weight], lr=1e-3, rounding="stochastic")
    loss = mlhead.linear_loss(x, head.weight, head.bias, targets, update=optimizer)
    loss.backward()      # updates head.weight, and makes the gradients of all else
    optimizer.step()     # ends the step

The gradient of a weight that is given to `group_fc_loss` or `linear_loss` with `update=` is made a block of classes at
a time, used and forgotten: it never exists whole, and the weight's `grad` stays None. See `ClassOptimizer`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import _check
from .ops._loss_chunks import Block, plan_blocks
from .ops._loss_update import grouped

Rounding = Literal["nearest", "stochastic", "kahan"]

_ROUNDINGS = ("nearest", "stochastic", "kahan")
_FEWEST = 1 << 18
BYTES_OF_A_NUMBER = 20  # the most that a block's temporaries take for each of its numbers
# Assumed for an H100; on a CPU a few MiB, which stay in the cache. Neither is tuned.
_MOST = {"cpu": 1 << 20, "cuda": 1 << 23}


def block_numbers(numel: int, device_type: str) -> int:
    """The most numbers of a block, by default: few beside the weight, enough to be worth the launches."""
    most = _MOST.get(device_type, _MOST["cuda"])
    return max(_FEWEST, min(most, numel // 128))


def _wide(dtype: torch.dtype) -> torch.dtype:
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
    """

    def __init__(
        self,
        optimizer: ClassOptimizer,
        group: dict[str, Any],
        parameter: Tensor,
        number: int,
        blocks: tuple[Block, ...],
        dtype: torch.dtype,
    ) -> None:
        self.optimizer, self.group, self.blocks, self.dtype = optimizer, group, blocks, dtype
        self.state: dict[str, Any] = optimizer.state[parameter]
        self.weight = grouped(parameter)
        self.wide = _wide(parameter.dtype)
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


class ClassOptimizer(Optimizer):
    """Base of the optimizers that update class weights inside backward.

    A step is one forward, one backward and `step()`. The backward of `group_fc_loss` or `linear_loss` with
    `update=optimizer` updates the weight by the learning rate of that moment; `step()` only ends the step, so that
    learning-rate schedulers and training loops find what they expect. Parameter groups, schedulers, hooks, `state_dict`
    and `load_state_dict` are those of `torch.optim`. All else, the bias too, has gradients as ever and needs an
    optimizer of its own.

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
          apart. The classes may be shared out among processes.
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
        """As of `torch.optim.Optimizer`, with checks."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[before:]
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        where = type(self).__name__
        _check.check_choice(where, "rounding", group["rounding"], _ROUNDINGS)
        if group["state_dtype"] not in (torch.float32, torch.bfloat16):
            self._fail("state_dtype", "torch.float32 or torch.bfloat16", group["state_dtype"])
        if group["block_numbers"] is not None:
            _check.check_positive(where, "block_numbers", group["block_numbers"])
        for name in ("lr", "weight_decay"):
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
        """Raises an error unless `parameter` is one of the optimizer's and had the same C in earlier steps."""
        if self._find(parameter) is None:
            _check.fail(where, "weight", "itself one of the parameters of `update`", "another tensor")
        before = self.state[parameter]["num_classes"] if parameter in self.state else num_classes
        if num_classes != before:
            _check.fail(where, "num_classes", f"{before}, as in earlier steps with `update`", num_classes)

    def check_backward(self, parameter: Tensor) -> None:
        """Raises an error if the parameter was updated in this step already."""
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
            if group["rounding"] == "kahan" and _wide(parameter.dtype) != parameter.dtype:
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
        """As of `torch.optim.Optimizer`, but each state keeps its own dtype, and is copied."""
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
    """

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
        if not group["momentum"] >= 0:
            self._fail("momentum", "at least 0", group["momentum"])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            self._fail("nesterov", "False without momentum or with dampening", True)

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Tensor]:
        """The momentum."""
        return {"momentum_buffer": self._like(parameter, group["state_dtype"])} if group["momentum"] else {}

    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """One step of SGD."""
        group, momentum = run.group, run.group["momentum"]
        if group["weight_decay"] != 0:
            gradient.add_(weight, alpha=group["weight_decay"])
        if momentum != 0:
            stored = run.part("momentum_buffer", block)
            if run.step == 1:
                stored.copy_(gradient)
            buffer = run.widened("momentum", block, stored)
            if run.step > 1:
                buffer.mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
                if buffer is not stored:
                    stored.copy_(buffer)
            gradient = gradient.add_(buffer, alpha=momentum) if group["nesterov"] else buffer
        weight.add_(gradient, alpha=-float(group["lr"]))


class ClassAdamW(ClassOptimizer):
    """`torch.optim.AdamW`, inside backward; see `ClassOptimizer` for what that costs.

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        lr: Learning rate.
        betas: Of the two moments, each of which needs a tensor of the weight's shape.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.
        rounding, state_dtype, seed, block_numbers: As for `ClassOptimizer`.
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
        for beta in group["betas"]:
            _check.check_probability(type(self).__name__, "betas", beta)
        if not group["eps"] >= 0:
            self._fail("eps", "at least 0", group["eps"])

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Tensor]:
        """The two moments."""
        return {
            "exp_avg": self._like(parameter, group["state_dtype"]),
            "exp_avg_sq": self._like(parameter, torch.float32),
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


class ClassAdafactor(ClassOptimizer):
    """`torch.optim.Adafactor` of each block of classes, inside backward; see `ClassOptimizer` for what that costs.

    Each block (n, D) of the weight, rows classes and columns features, is updated as if it were a parameter of its own:
    it has its own mean square per feature, its own relative step and its own clipping. All that is kept between steps
    is one number per class and D per block.

    The gradients of a mean over B * C elements shrink with C, and below `eps[0]` Adafactor no longer normalises: for
    many classes take a smaller one (down to 1e-18, its square being a number of fp32 too), or reduction="sum".

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        lr: The largest relative step; it is min(lr, 1 / sqrt(step)) times the root mean square of the block.
        beta2_decay: The mean squares decay by 1 - step ** beta2_decay.
        eps: The least root mean square of a gradient, None for 1.2e-7 (fp64: 2.2e-16); and the least one of a weight.
        d: The largest root mean square of an update, before the step.
        weight_decay: Decoupled.
        rounding, state_dtype, seed, block_numbers: As for `ClassOptimizer`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "nearest",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        block_numbers: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed, block_numbers=block_numbers
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        eps1, eps2 = group["eps"]
        if not ((eps1 is None or eps1 >= 0) and eps2 >= 0):
            self._fail("eps", "two numbers of at least 0, the first perhaps None", group["eps"])
        if not group["beta2_decay"] <= 0:
            self._fail("beta2_decay", "at most 0", group["beta2_decay"])
        if not group["d"] >= 1:
            self._fail("d", "at least 1", group["d"])

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Tensor]:
        """The mean square of each class and, for each block, of each feature."""
        (G, E, J), wide = grouped(parameter).shape, _wide(parameter.dtype)
        return {"row_var": parameter.new_zeros(G, J, dtype=wide), "col_var": parameter.new_zeros(blocks, E, dtype=wide)}

    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """One step of Adafactor on the block alone; no number goes to the host."""
        group, lr = run.group, float(run.group["lr"])
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(run.wide).eps if eps1 is None else eps1
        size = weight.numel() ** 0.5
        forget = float(run.step) ** group["beta2_decay"]
        norm = torch.linalg.vector_norm
        alpha = (norm(weight) / size).clamp_(min=eps2).mul_(min(lr, 1 / run.step**0.5))
        if group["weight_decay"] != 0:
            weight.mul_(1 - lr * group["weight_decay"])

        g, E, n = gradient.shape
        rows, columns = run.state["row_var"][block.groups, block.columns], run.state["col_var"][run.order(block)]
        rows.lerp_(norm(gradient, dim=1).square_().div_(E), forget)
        columns.lerp_(norm(gradient, dim=(0, 2)).square_().div_(g * n), forget)
        update = torch.mul(rows.unsqueeze(1), columns.view(1, E, 1), out=run.spare("update", block))
        update.div_(rows.mean().clamp_(min=eps1))
        update.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
        denominator = (norm(update) / (size * group["d"])).clamp_(min=1.0)
        weight.addcmul_(update, alpha.div_(denominator), value=-1)
