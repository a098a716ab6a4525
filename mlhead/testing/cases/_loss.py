"""Targets and options of the cases of the losses in the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import SparseTargets
from ..case import Dims


def upstream(dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """A random upstream gradient of a loss: a scalar."""
    value = 1.0 + torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(device, torch.promote_types(dtype, torch.float32))


def loss_options(dims: Dims, device: str, seed: int) -> dict[str, Any]:
    """Targets and keywords: dims give `loss`, and perhaps `sparse`, `weights`, `ignore` and `options`."""
    B, C, loss = dims["B"], dims["C"], dims.get("loss", "bce")
    random = torch.Generator().manual_seed(seed + 17)
    options: dict[str, Any] = {"loss": loss, **dims.get("options", {})}
    if dims.get("positives"):  # too many classes to draw each one's label
        rows = [sorted(torch.randint(C, (dims["positives"],), generator=random).unique().tolist()) for _ in range(B)]
        return {**options, "targets": SparseTargets.from_lists(rows, C).to(device)}
    y = torch.rand(B, C, generator=random) < 0.3
    if loss == "softmax":
        y = torch.zeros(B, C, dtype=torch.bool)
        if B * C:
            y[torch.arange(B), torch.randint(C, (B,), generator=random)] = True
    unknown = torch.rand(B, C, generator=random) < 0.2 if dims.get("ignore") else None
    if dims.get("sparse"):
        if unknown is not None:
            options["ignore"] = SparseTargets.from_dense(unknown & ~y).to(device)
        options["targets"] = SparseTargets.from_dense(y).to(device)
    else:
        if unknown is not None:
            options["ignore"] = unknown.to(device)
        options["targets"] = y.to(device, dims.get("target_dtype", torch.bool))
    if dims.get("weights"):
        options["class_weight"] = (0.5 + torch.rand(C, generator=random)).to(device)
        options["sample_weight"] = (0.5 + torch.rand(B, generator=random)).to(device)
        if loss == "bce":
            options["pos_weight"] = (0.5 + 2 * torch.rand(C, generator=random)).to(device)
    return options
