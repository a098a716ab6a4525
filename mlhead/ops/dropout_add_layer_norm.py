"""The op dropout_add_layer_norm: the residual step of a post-norm transformer layer in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _check
from .._backend import Implementation
from ..reference import dropout_add_layer_norm as reference
from ._fused import FusedOp, autocast, is_autocasting
from ._seed import seed_tensor

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> Any:
    from ..kernels import dropout_add_layer_norm

    return dropout_add_layer_norm


class _Extension:
    """The launchers of the C++/CUDA extension."""

    @staticmethod
    def dropout_add_layer_norm(*inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.mlhead_C.dropout_add_layer_norm.default(*inputs)

    @staticmethod
    def dropout_add_layer_norm_backward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, needs = args
        return torch.ops.mlhead_C.dropout_add_layer_norm_backward.default(*tensors, *needs)


def _fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if _backend.resolve("dropout_add_layer_norm", backend, x.device, x.dtype) == "reference":
        return out, x.new_empty(0)
    return out, x.new_empty((2, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))


def _reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    return reference.dropout_add_layer_norm(*inputs), inputs[0].new_empty(0)


def _reference_grad(*args: Any) -> tuple[Tensor, ...]:
    return reference.dropout_add_layer_norm_grad(*args[:-1])  # without what another backend kept


# The second output is what backward needs of each row: mean and 1 / std (2, B, N) in the accumulation dtype.
_dropout_add_layer_norm = FusedOp(
    "dropout_add_layer_norm",
    "Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float dropout_p, float eps",
    outputs=2,
    differentiable=(0, 1, 2, 3),
    reference=_reference,
    reference_grad=_reference_grad,
    fake=_fake,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
    },
)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Layer norm of a residual sum, with dropout on what is added: one read of both, one write, no mask in memory.

    out = LayerNorm(residual + dropout(x)) weight + bias    over the last axis

    Args:
        x: (B, N, E), floating, E >= 1; any strides, such as queries expanded over the batch.
        residual: (B, N, E) of the dtype of x.
        weight: (E,) of the dtype of x, or fp32.
        bias: (E,) of the dtype of weight.
        dropout_p: Probability in [0, 1) of dropping a number of x; the rest are scaled by 1 / (1 - dropout_p).
        eps: Added to the variance, >= 0.
        seed: Of the dropout mask: an integer, an int64 scalar tensor, or None for a fresh one from torch's generator.
            Image b of seed s has the mask of image b - 1 of seed s + 1, so do not count seeds up: draw them.
            The mask is a function of the seed and the position alone, the same in backward and on every backend.
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.

    Returns:
        (B, N, E) of the dtype of x, contiguous; under autocast x and residual are cast to autocast's dtype first,
        weight and bias are not.

    Raises:
        ValueError: A shape, a device, dropout_p or eps does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, the dtypes do not fit, or the seed is of a wrong type or dtype.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        Everything between the inputs and the output in fp32 (fp64 for fp64). The sums of dweight and dbias run in an
        order that is a function of the shape alone.

    Source:
        The post-norm layer of ML-Decoder, Fig. 3: LN1(q + dropout(q)), LN2, LN3.
    """
    where = "dropout_add_layer_norm"
    _check.check_tensor(where, "x", x)
    if is_autocasting(x.device.type):
        x, residual = autocast(x.device.type, x, residual)  # type: ignore[assignment]
    _check.check_ndim(where, "x", x, "(B, N, E)")
    E = x.shape[2]
    if E == 0:
        _check.fail(where, "x", "of at least one feature (E >= 1)", tuple(x.shape))
    _check.check_tensor(where, "residual", residual)
    _check.check_shape(where, "residual", residual, "(B, N, E)", x.shape)
    _check.check_like(where, "residual", residual, "x", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check.check_tensor(where, name, tensor)
        _check.check_shape(where, name, tensor, "(E,)", (E,))
        if tensor.device != x.device:
            _check.fail(where, name, f"on {x.device} like x", tensor.device)
    if weight.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        _check.fail(where, "weight", f"{x.dtype} like x, or torch.float32", weight.dtype, TypeError)
    _check.check_like(where, "bias", bias, "weight", weight)
    _check.check_probability(where, "dropout_p", dropout_p)
    if not eps >= 0.0:
        _check.fail(where, "eps", "at least 0", eps)
    on_device = seed_tensor(where, seed, x.device) if dropout_p > 0.0 else None
    inputs = (x, residual, weight, bias, on_device, float(dropout_p), float(eps))
    return _dropout_add_layer_norm(*inputs, backend=backend)[0]


def dropout_add(x: Tensor, residual: Tensor, *, dropout_p: float, seed: Tensor | None) -> Tensor:
    """What `dropout_add_layer_norm` takes the norm of, residual + dropout(x) with its masks, in plain torch."""
    if is_autocasting(x.device.type):
        x, residual = autocast(x.device.type, x, residual)  # type: ignore[assignment]
    on_device = seed_tensor("dropout_add", seed, x.device) if dropout_p > 0.0 else None
    return reference.dropout_add(x, residual, on_device, dropout_p)[0].to(x.dtype)
