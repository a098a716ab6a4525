"""What plain PyTorch costs by the same arithmetic: every ATen op that a baseline runs, counted on fake tensors.

A matrix product, a 1x1 convolution too, is one of the vendor's library. Every other op is a kernel that reads its
inputs and writes its output once; views are free. What L2 may keep is taken to come from there. All of this favours
plain PyTorch: softmax over a strided axis, for one, reads more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlhead.testing import CASES

from ..baselines import BASELINES
from .devices import Work
from .products import KEPT_BYTES, Problem, torch_pass, vendor_product

DTYPES = {2: torch.bfloat16, 4: torch.float32}


Shape = tuple[int, ...]
Inputs = tuple[dict[str, Shape], dict[str, Any], Shape]  # shapes of the tensors, options, shape of the result


def _group_fc(p: Problem) -> Inputs:
    G, E, C = p["G"], p["E"], p["C"]
    shapes = {"h": (p["B"], G, E), "weight": (G, E, math.ceil(C / G)), "bias": (C,)}
    return shapes, {"num_classes": C}, (p["B"], C)


def _csra_pool(p: Problem) -> Inputs:
    B, L, D, H, C = (p[letter] for letter in "BLDHC")
    height = max(n for n in range(1, math.isqrt(L) + 1) if L % n == 0)
    shapes: dict[str, Shape] = {"x": (B, D, height, L // height), "weight": (H, C, D)}
    one = CASES["csra_pool"].make({"B": 1, "L": 1, "D": 1, "H": H, "C": 1}, torch.float32, "cpu", 0)
    return shapes, {"bias": None, **one.options}, (B, C)


INPUTS: Mapping[str, Callable[[Problem], Inputs]] = {"group_fc": _group_fc, "csra_pool": _csra_pool}


class _Counter(TorchDispatchMode):
    """Collects a Work for each op that runs."""

    def __init__(self, p: Problem) -> None:
        super().__init__()
        self.p = p
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.works += self._of(func, args, given, [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out

    def _of(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> Iterator[Work]:
        name = func._schema.name.removeprefix("aten::")
        size = self.p.element_bytes
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            a, b = given[-2:]
            m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
            batch = a.shape[0] if a.ndim == 3 else 1
            yield vendor_product(self.p, m, n, k, float(size * (m * k + k * n + m * n)), batch=batch)
        elif name == "convolution":
            x, weight = args[0], args[1]
            rows, n, k = x.numel() // x.shape[1], *weight.shape[:2]
            yield vendor_product(self.p, rows, n, k, float(size * (rows * k + k * n + rows * n)))
        elif name == "convolution_backward":
            dout, x, weight = args[0], args[1], args[2]
            rows, n, k = x.numel() // x.shape[1], *weight.shape[:2]
            moved = float(size * (rows * k + k * n + rows * n))
            yield vendor_product(self.p, rows, k, n, moved)
            yield vendor_product(self.p, n, k, dout.numel() // n, moved)
        elif not func.is_view and not name.startswith(("empty", "new_empty")) and made:
            # An alias of its input without `is_view` is a view, too, unless the op writes.
            if not func._schema.is_mutable and any(made[0] is t or _same_memory(made[0], t) for t in given):
                return
            bytes_of = [_bytes(t) for t in (*given, *([] if func._schema.is_mutable else made))]
            yield _pass(name, bytes_of)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """What a kernel reads or writes of a tensor; of an expanded one no more than there is."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _pass(name: str, bytes_of: list[int]) -> Work:
    """A pass whose smaller tensors are in L2."""
    memory = float(sum(size for size in bytes_of if size > KEPT_BYTES))
    return replace(torch_pass(name, float(sum(bytes_of))), dram=memory)


def plain(op: str) -> tuple[str, ...]:
    """The published formulation and the best plain one."""
    return tuple(BASELINES[op])[:2]


def eager(op: str, baseline: str, p: Problem) -> dict[str, list[Work]]:
    """The kernels of a baseline's passes."""
    function = BASELINES[op][baseline]
    shapes, options, out_shape = INPUTS[op](p)
    dtype = DTYPES[p.element_bytes]
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        dout = torch.empty(out_shape, dtype=dtype)
        with torch.no_grad(), _Counter(p) as forward:
            function(**tensors, **options)
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        with _Counter(p) as both:
            out = function(**leaves, **options)
            torch.autograd.grad(out, list(leaves.values()), dout)
    return {"forward": forward.works, "both": both.works}


def least_with_a_map(p: Problem) -> dict[str, list[Work]]:
    """csra_pool with its map in memory and nothing wasted, which no compiler reaches: a bound for torch.compile.

    One product for all heads; one kernel reads the scores, one more reads them and writes their gradient; two products.
    """
    B, L, D, N, size = p["B"], p["L"], p["D"], p["H"] * p["C"], p.element_bytes
    scores, weight, x = size * B * L * N, size * N * D, size * B * L * D
    norms, pooled = _pass("norms", [weight, weight]), _pass("pooled", [scores])
    forward = [norms, vendor_product(p, B * L, N, D, float(x + weight + scores)), pooled]
    backward = [
        _pass("ds", [scores, scores]),
        vendor_product(p, B * L, D, N, float(scores + weight + x)),
        vendor_product(p, N, D, B * L, float(scores + weight + x)),
        _pass("norms' gradient", [weight, weight, weight]),
    ]
    return {"forward": forward, "both": forward + backward}
