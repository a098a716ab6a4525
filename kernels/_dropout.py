"""The counter-based dropout of all kernels: a hash of the seed, the image and the number of the element.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def dropout_arguments(seed: Tensor | None, dropout_p: float, placeholder: Tensor) -> dict[str, Any]:
    """What a launch of a kernel with dropout gets, without dropout a placeholder for the seed."""
    return {
        "seed_ptr": placeholder if seed is None else seed,
        # 2^31 less than the hash's, so that it is an int32 whatever the probability.
        "threshold": min(int(dropout_p * 2.0**32), 2**32 - 1) - 2**31,
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "DROPOUT": seed is not None and dropout_p > 0.0,
    }


@triton.jit
def _mix(x):
    """The lowbias32 hash of a uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def image_keys(seed, b):
    """The two keys of an image, uint32."""
    key0 = _mix(_mix(seed.to(tl.uint32) + tl.cast(b, tl.uint32)) + (seed >> 32).to(tl.uint32))
    return key0, _mix(key0 + 1)


@triton.jit
def survives(i, key0, key1, threshold):
    """Which of the numbers i (uint32) of an image survive; threshold is 2^31 less than the hash's."""
    u = i + key0
    u = ((u ^ (u >> 16)) * 0x7FEB352D) ^ key1
    u = (u ^ (u >> 15)) * 0x846CA68B
    u = u ^ (u >> 16)
    return u >= tl.full((1, 1), threshold, tl.int32).to(tl.uint32) + 0x80000000
