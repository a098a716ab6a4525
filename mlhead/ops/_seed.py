"""The seed of a dropout mask."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .. import _check


def seed_tensor(where: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A seed as an int64 scalar on a device: a fresh one for None, a number, or a tensor as it is."""
    if seed is None:
        # Drawn on the device by torch's own generator: no synchronisation, and CUDA graphs replay it anew.
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            error = TypeError if seed.dtype != torch.int64 else ValueError
            _check.fail(where, "seed", "an int64 scalar tensor", f"{seed.dtype} {tuple(seed.shape)}", error)
        return seed.to(device)
    if not isinstance(seed, numbers.Integral):
        _check.fail(where, "seed", "an int, an int64 scalar tensor or None", type(seed).__name__, TypeError)
    if not -(2**63) <= seed < 2**63:
        _check.fail(where, "seed", "a 64-bit integer", seed)
    return torch.full((), int(seed), dtype=torch.int64, device=device)
