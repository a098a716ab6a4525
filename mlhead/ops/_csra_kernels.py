"""The kernels that csra_pool's chunks are made of, and each backend's form of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Options(NamedTuple):
    """What csra_pool takes besides tensors, and C: column n belongs to head n div C."""

    temperatures: tuple[float, ...]
    lam: tuple[float, ...]
    average: float
    classes: int


class Pooling(Protocol):
    """The kernels of a backend. Scores are (b, L, n) raw products of the columns from `first` on."""

    def pool(self, scores: Tensor, scale: Tensor | None, options: Options, first: int, pooled: Tensor) -> None:
        """pooled[b, n] = average mean_l s + lam A(s), with s = scale[n] scores[b, :, n]."""

    def pool_backward(
        self,
        scores: Tensor,
        scale: Tensor | None,
        options: Options,
        first: int,
        dlogits: Tensor,
    ) -> None:
        """Scores become scale ds in place, for dlogits (b, C)."""

    def unit_rows_backward(self, dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """Subtracts u <dw, u> from dw in place, with u = weight / norm; `divide` also divides that by the norm."""

    def fuses(self, x: Tensor, columns: int, chunks: int) -> bool:
        """Whether the backend has a kernel that pools without a scratch, cheaper than `chunks` chunks."""

    def fused(self, x: Tensor, weight: Tensor, scale: Tensor | None, options: Options, pooled: Tensor) -> None:
        """Pools all scores of x (B, L, D) and weight (H, C, D) into pooled (B, N)."""


@lru_cache(maxsize=256)
def heads_on_cpu(options: Options) -> Tensor:
    """Temperatures and lam as the (2, H) fp64 tensor that the extension's kernels take."""
    return torch.tensor([options.temperatures, options.lam], dtype=torch.float64)


_design: ContextVar[str | None] = ContextVar("mlhead_csra_design", default=None)


@contextmanager
def forward_design(name: str) -> Iterator[None]:
    """Makes the Triton forward take one of its designs, "fused" or "chunked", whatever the costs say; for measuring."""
    token = _design.set(name)
    try:
        yield
    finally:
        _design.reset(token)


class TritonPooling:
    """The kernels of kernels/csra_pool.py, which is given as a module."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def pool(self, scores: Tensor, scale: Tensor | None, options: Options, first: int, pooled: Tensor) -> None:
        """As `Pooling.pool`."""
        self.kernels.pool(scores, scale, *options, first, pooled)

    def pool_backward(
        self, scores: Tensor, scale: Tensor | None, options: Options, first: int, dlogits: Tensor
    ) -> None:
        """As `Pooling.pool_backward`."""
        self.kernels.pool_backward(scores, scale, *options, first, dlogits)

    def unit_rows_backward(self, dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """As `Pooling.unit_rows_backward`."""
        self.kernels.unit_rows_backward(dw, weight, norm, divide)

    def fuses(self, x: Tensor, columns: int, chunks: int) -> bool:
        """As `Pooling.fuses`."""
        design = _design.get() or self.kernels.forward_design(*x.shape, columns, x.element_size(), chunks)
        return design == "fused"

    def fused(self, x: Tensor, weight: Tensor, scale: Tensor | None, options: Options, pooled: Tensor) -> None:
        """As `Pooling.fused`."""
        self.kernels.fused_forward(x, weight, scale, options.temperatures, options.lam, options.average, pooled)


class ExtensionPooling:
    """The pooling kernels of the C++/CUDA extension."""

    @staticmethod
    def fuses(x: Tensor, columns: int, chunks: int) -> bool:
        """As `Pooling.fuses`: it has none."""
        return False

    @staticmethod
    def fused(x: Tensor, weight: Tensor, scale: Tensor | None, options: Options, pooled: Tensor) -> None:
        """Never called."""
        raise NotImplementedError

    @staticmethod
    def pool(scores: Tensor, scale: Tensor | None, options: Options, first: int, pooled: Tensor) -> None:
        """As `Pooling.pool`."""
        ops: Any = torch.ops.mlhead_C
        heads = heads_on_cpu(options)
        ops.csra_pool_scores.default(scores, scale, heads, options.classes, first, options.average, pooled)

    @staticmethod
    def pool_backward(
        scores: Tensor,
        scale: Tensor | None,
        options: Options,
        first: int,
        dlogits: Tensor,
    ) -> None:
        """As `Pooling.pool_backward`."""
        ops: Any = torch.ops.mlhead_C
        heads = heads_on_cpu(options)
        ops.csra_pool_scores_backward.default(scores, scale, heads, options.classes, first, options.average, dlogits)

    @staticmethod
    def unit_rows_backward(dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """As `Pooling.unit_rows_backward`."""
        ops: Any = torch.ops.mlhead_C
        ops.csra_unit_rows_backward.default(dw, weight, norm, divide)
