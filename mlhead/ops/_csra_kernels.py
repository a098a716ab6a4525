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
        ds: Tensor,
    ) -> None:
        """Writes scale ds, for dlogits (b, C), into `ds`: of the strides of scores, or scores itself."""

    def norms(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The norms (n,) of the rows of weight (n, D), 1 where 0, and one over them; fp32, of fp64 fp64."""

    def unit_rows_backward(self, dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """Subtracts u <dw, u> from dw in place, with u = weight / norm; `divide` also divides that by the norm."""

    def fuses(self, x: Tensor, columns: int, chunks: int) -> bool:
        """Whether the backend has a kernel that pools without a scratch, cheaper than `chunks` chunks."""

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, options: Options) -> Tensor:
        """Logits (B, C) of x (B, L, D), weight (H, C, D) and bias (H, C)."""


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
        self, scores: Tensor, scale: Tensor | None, options: Options, first: int, dlogits: Tensor, ds: Tensor
    ) -> None:
        """As `Pooling.pool_backward`."""
        self.kernels.pool_backward(scores, scale, *options, first, dlogits, ds)

    def norms(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pooling.norms`."""
        norm, reciprocal = self.kernels.norms(weight)
        return norm, reciprocal

    def unit_rows_backward(self, dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """As `Pooling.unit_rows_backward`."""
        self.kernels.unit_rows_backward(dw, weight, norm, divide)

    def fuses(self, x: Tensor, columns: int, chunks: int) -> bool:
        """As `Pooling.fuses`."""
        design = _design.get() or self.kernels.forward_design(*x.shape, columns, x.element_size(), chunks)
        return design == "fused"

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, options: Options) -> Tensor:
        """As `Pooling.fused`."""
        logits: Tensor = self.kernels.fused_forward(
            x, weight, bias, scale, options.temperatures, options.lam, options.average
        )
        return logits


class ExtensionPooling:
    """The pooling kernels of the C++/CUDA extension."""

    @staticmethod
    def fuses(x: Tensor, columns: int, chunks: int) -> bool:
        """As `Pooling.fuses`: it has none."""
        return False

    @staticmethod
    def fused(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, options: Options) -> Tensor:
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
        ds: Tensor,
    ) -> None:
        """As `Pooling.pool_backward`."""
        ops: Any = torch.ops.mlhead_C
        place = heads_on_cpu(options), options.classes, first, options.average
        ops.csra_pool_scores_backward.default(scores, scale, *place, dlogits, ds)

    @staticmethod
    def norms(weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pooling.norms`."""
        norm = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.promote_types(weight.dtype, torch.float32))
        # The view is for torch 2.11, whose fake form keeps an axis of length 1.
        norm = torch.where(norm == 0, 1.0, norm).view(weight.shape[:-1])
        return norm, norm.reciprocal()

    @staticmethod
    def unit_rows_backward(dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
        """As `Pooling.unit_rows_backward`."""
        ops: Any = torch.ops.mlhead_C
        ops.csra_unit_rows_backward.default(dw, weight, norm, divide)
