"""The norm of all gradients, where some parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .. import _check


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales all gradients so that their norm, over all devices, is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, for parameters of which some are whole, as DDP leaves them, and others DTensors
    on one mesh or several. Every device calls it, with the same parameters.

    Args:
        parameters: A tensor or several; those without a gradient do not count.
        max_norm: Largest 2-norm, above 0.
        error_if_nonfinite: Whether a norm that is infinite or NaN is an error.

    Returns:
        The norm before, a scalar; the same on all devices.

    Raises:
        ValueError: `max_norm` is not above 0.
        RuntimeError: The norm is infinite or NaN, with `error_if_nonfinite`; no gradient has been scaled then.
    """
    if not max_norm > 0:
        _check.fail("clip_grad_norm_", "max_norm", "above 0", max_norm)
    chosen = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in chosen:
        if (grad := parameter.grad) is not None:
            by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    norms = []
    for members in by_mesh.values():
        norm = get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return torch.tensor(0.0)
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"clip_grad_norm_: the norm of the gradients must be finite, got {total.item()}")
    for members in by_mesh.values():
        clip_grads_with_norm_(members, max_norm, total)
    return total
