"""What the kernels of group_fc share: their tiles, and what decides their sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import triton
from torch import Tensor

from ._device import Device


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one kernel: its tile in b, e and j, and what runs it."""

    BLOCK_B: int
    BLOCK_E: int
    BLOCK_J: int
    num_warps: int
    num_stages: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that tl.dot takes) to `most`."""
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def stages_of(stage_elements: int, element_bytes: int, device: Device) -> int:
    """As many pipeline stages, from 1 to 4, as fit in three quarters of the shared memory; on sm_90 in a half.

    There a second program is resident, less 2048 bytes that each takes besides. By the cycles of benchmarks/cycles.py,
    at B=128 E=768 G=100 C=10^6 in bf16 that is 750 us instead of 993; not yet measured.
    """
    most = device.shared_bytes // 2 - 2048 if device.capability == 90 else int(0.75 * device.shared_bytes)
    return max(1, min(4, most // (stage_elements * element_bytes)))


def depth(size: int, most: int, wide: bool, device: Device) -> int:
    """The tile of the axis that is summed over: at most `most`, 32 where shared memory is short, 16 in fp32.

    In fp32 without TF32 a thread holds its operands of the whole tile in registers.
    """
    return block(size, min(most, 64 if device.shared_bytes > 128 * 1024 else 32) if wide else 16)


def warps_of(largest: int, light: bool) -> int:
    """8 warps where a tile has so many elements that 4 would run short of registers, else 4.

    `light` is a tile of 16-bit vectors. Without vectors every element of an operand has an address and a mask of its
    own in registers.
    """
    return 8 if largest > (8192 if light else 2048) else 4


def vectorised(*tensors: Tensor) -> bool:
    """Whether Triton loads these 16 bytes at a time: contiguous rows, and everything divisible by 16 elements."""
    return all(
        t.stride(-1) == 1 and not (t.shape[-1] | t.stride(0) | t.stride(-2) | t.storage_offset()) % 16 for t in tensors
    )
