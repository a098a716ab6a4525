"""The op relu_dropout: what stands between the two layers of a feed-forward network, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._backend import Implementation
from ..reference import relu_dropout as reference
from ._fused import FusedOp, autocast, is_autocasting
from ._seed import seed_tensor

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> Any:
    from ..kernels import relu_dropout

    return relu_dropout


class _Extension:
    """The launchers of the C++/CUDA extension."""

    @staticmethod
    def relu_dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
        return torch.ops.mlhead_C.relu_dropout.default(x, seed, dropout_p)

    @staticmethod
    def relu_dropout_backward(
        dout: Tensor, out: Tensor, seed: Tensor | None, dropout_p: float, needs: list[bool]
    ) -> Tensor:
        return torch.ops.mlhead_C.relu_dropout_backward.default(dout, out, dropout_p)


def _fake(x: Tensor, seed: Tensor | None, dropout_p: float, backend: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Backward takes the output in the place of x: it is positive where x is and nothing was dropped.
_relu_dropout = FusedOp(
    "relu_dropout",
    "Tensor x, Tensor? seed, float dropout_p",
    outputs=1,
    replaced=0,
    differentiable=(0,),
    reference=reference.relu_dropout,
    reference_grad=lambda *args: (reference.relu_dropout_grad(*args),),
    fake=_fake,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
    },
)


def relu_dropout(
    x: Tensor, *, dropout_p: float = 0.0, seed: int | Tensor | None = None, backend: str | None = None
) -> Tensor:
    """ReLU and dropout in one pass, without a mask in memory; only the output is kept for backward.

    out = dropout(max(x, 0))

    Args:
        x: (B, N, F), floating, of any strides.
        dropout_p: Probability in [0, 1) of dropping a number; the rest are scaled by 1 / (1 - dropout_p).
        seed: Of the dropout mask: an integer, an int64 scalar tensor, or None for a fresh one from torch's generator.
            Image b of seed s has the mask of image b - 1 of seed s + 1, so do not count seeds up: draw them.
            The mask is a function of the seed and the position alone, the same on every backend.
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.

    Returns:
        (B, N, F) of the dtype of x, contiguous; under autocast x is cast to autocast's dtype first. NaN stays NaN.

    Raises:
        ValueError: The shape or dropout_p does not fit; the message names the argument.
        TypeError: x is no floating tensor, or the seed is of a wrong type or dtype.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        Multiplied in fp32 (fp64 for fp64) and rounded once.

    Source:
        The feed-forward network of ML-Decoder, Fig. 3.
    """
    where = "relu_dropout"
    _check.check_tensor(where, "x", x)
    if is_autocasting(x.device.type):
        (x,) = autocast(x.device.type, x)  # type: ignore[assignment]
    _check.check_ndim(where, "x", x, "(B, N, F)")
    _check.check_probability(where, "dropout_p", dropout_p)
    on_device = seed_tensor(where, seed, x.device) if dropout_p > 0.0 else None
    return _relu_dropout(x, on_device, float(dropout_p), backend=backend)
