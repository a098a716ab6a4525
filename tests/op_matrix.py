"""Every op x backend x device x dtype as pytest parameters, and how inputs are laid out in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mlhead import _backend
from mlhead.testing import CASES, OpCase

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda")


def _skip_reason(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA device"
    if backend == "triton" and _backend.interpreting() and dtype == torch.bfloat16:
        return "bf16 is wrong in Triton's interpreter"
    return _backend._refusal(op, _backend.implementations(op), backend, device, dtype)


def _runs_somewhere(op: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether this combination exists at all; what does not exist is no test, rather than a skipped one."""
    if backend == "reference":
        return True
    implementation = _backend.implementations(op).get(backend)
    if implementation is None or dtype not in implementation.dtypes:
        return False
    return device in implementation.devices or (backend == "triton" and _backend.interpreting() and device == "cpu")


def _combinations(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[object]:
    """The pytest parameters (case, backend, device, dtype); a skip says why."""
    for case in CASES.values():
        for device in DEVICES:
            for backend in _backend.BACKENDS:
                for dtype in dtypes:
                    if not _runs_somewhere(case.name, backend, device, dtype):
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    reason = _skip_reason(case.name, backend, device, dtype)
                    if reason is not None and device == "cpu":
                        marks.append(pytest.mark.skip(reason=reason))
                    name = f"{case.name}-{backend}-{device}-{str(dtype).removeprefix('torch.')}"
                    yield pytest.param(case, backend, device, dtype, marks=marks, id=name)


def every_combination(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Callable:
    """The decorator that runs a test for each of `_combinations`."""
    return pytest.mark.parametrize(("case", "backend", "device", "dtype"), list(_combinations(dtypes)))


# Each takes a contiguous tensor and gives one of the same shape in another layout; unused memory between the elements
# is NaN, so that a read outside the tensor shows. All but `expanded` keep the values.


def contiguous(tensor: Tensor) -> Tensor:
    """The plain layout."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """Axes in reversed order in memory (channels-last for a map as tokens)."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def strided(tensor: Tensor) -> Tensor:
    """Every other element of every axis of a buffer of NaN, off its beginning."""
    buffer = tensor.new_full([2 * size + 1 for size in tensor.shape], float("nan"))
    view = buffer[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def padded(tensor: Tensor) -> Tensor:
    """Rows of a wider buffer of NaN: the last axis contiguous, nothing aligned."""
    if tensor.ndim == 0:
        return tensor
    buffer = tensor.new_full([*tensor.shape[:-1], tensor.shape[-1] + 3], float("nan"))
    return buffer[..., 1 : 1 + tensor.shape[-1]].copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first index of the first axis for all, with stride 0."""
    return tensor[:1].expand(tensor.shape) if tensor.ndim and tensor.shape[0] else tensor


LAYOUTS = {f.__name__: f for f in (contiguous, transposed, strided, padded, expanded)}

__all__ = ["CASES", "DTYPES", "LAYOUTS", "OpCase", "every_combination"]
