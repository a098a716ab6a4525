"""What the launchers ask of a device, and the guard around a launch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Device:
    """The facts that launch configurations depend on.

    Args:
        capability: Ten times the major plus the minor compute capability, e.g. 90; that of the kin for tiles.
        multiprocessors: Number of streaming multiprocessors.
        shared_bytes: Shared memory that one program may use.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int


H100 = Device(capability=90, multiprocessors=132, shared_bytes=232_448)


@cache
def _query(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Device(
        89 if capability >= 120 else capability,  # whose instructions and shared memory sm_120 has
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def device_of(tensor: Tensor) -> Device:
    """The device a tensor is on; in Triton's interpreter, on CPU tensors, an H100 stands in."""
    return _query(tensor.device.index) if tensor.device.type == "cuda" else H100


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device current around a launch; free when it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def dot_precision(tensor: Tensor) -> str:
    """`input_precision` of tl.dot: TF32 for fp32 only where torch's own matrix products may use it."""
    if tensor.dtype != torch.float32:
        return "ieee"
    # The newer switch also answers for the older ones; where it was used, reading the older one raises.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    allowed = torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "ieee"
