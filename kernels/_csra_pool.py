"""What the pooling kernels of csra_pool share: the heads' constants, and sums over parts of a column's positions.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from functools import lru_cache

import triton
import triton.language as tl

# Below any score, and finite: differences from it are no NaN.
LOWEST = tl.constexpr(-1.0e30)


@lru_cache
def sharpness(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """The temperatures times log2 e, for exp2; 0 where infinite."""
    return tuple(0.0 if T == math.inf else T * math.log2(math.e) for T in temperatures)


@lru_cache
def infinite(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """1 where a temperature is infinite, else 0."""
    return tuple(float(T == math.inf) for T in temperatures)


@triton.jit
def of_head(values: tl.constexpr, h, H: tl.constexpr):
    """The values of the heads h."""
    found = tl.zeros_like(h).to(tl.float32)
    for i in tl.static_range(H):
        found = tl.where(h == i, values[i], found)
    return found


@triton.jit
def merge(m, z, w, m_new, z_new, w_new, sharp):
    """Two parts of a column's positions as one: maximum, sum of e, sum of e (s - maximum)."""
    top = tl.maximum(m, m_new)
    down, down_new = m - top, m_new - top
    f, f_new = tl.exp2(down * sharp), tl.exp2(down_new * sharp)
    return top, z * f + z_new * f_new, (w + z * down) * f + (w_new + z_new * down_new) * f_new


@triton.jit
def pooled_of(m, z, w, t, h, average, L, HEADS: tl.constexpr, INFINITE: tl.constexpr, LAM: tl.constexpr):
    """The columns' average mean_l s + lam A, of maximum, sum of e, sum of e (s - maximum) and sum of s."""
    attended = m + tl.where(of_head(INFINITE, h, HEADS) != 0, 0.0, tl.div_rn(w, z))
    return t * (average / L) + of_head(LAM, h, HEADS) * attended
