"""What the kernels of query_attention share: their tiles, rows of features in two parts, weights and ds of a tile.

The algorithm is in query_attention.py. Kernels take rows as pointers (N,) to the first feature of a head, so that q,
k, v and dout are read with any strides; a head's features come in two parts of D0 and D1, each a power of two. Where
D1 is 0 the second part is the first one again: it goes unused, and the compiler removes it.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._device import dot_precision
from ._dropout import dropout_arguments, image_keys, survives

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class AttentionTile:
    """Launch configuration of one kernel.

    Args:
        BLOCK_G: Queries of a tile.
        BLOCK_L: Positions of a tile.
        D0: Features of a head in the first part of the results, a power of two.
        D1: Those in the second part, a power of two or 0.
        DEPTH: Features of a slice where the scores are summed over slices; 0 where q and k are held whole.
        num_warps: Warps of a program.
        num_stages: Stages of the pipelined loads.
    """

    BLOCK_G: int
    BLOCK_L: int
    D0: int
    D1: int
    DEPTH: int
    num_warps: int
    num_stages: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)

    def slices(self, width: int) -> int:
        """How many programs share the columns of a head."""
        return triton.cdiv(width, self.D0 + self.D1)


def head_parts(width: int) -> tuple[int, int]:
    """Two powers of two, at least 16, that cover the width of a head; the second is 0 where one is enough."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = width - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that tl.dot takes) to `most`."""
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def vectorised(width: int, *tensors: Tensor) -> bool:
    """Whether Triton loads these 16 bytes at a time: contiguous rows, and heads and rows of whole 16 elements."""
    return width % 16 == 0 and all(
        t.stride(-1) == 1 and not (t.stride(0) | t.stride(-2) | t.storage_offset()) % 16 for t in tensors
    )


def sliced_tile(G: int, L: int, width: int, element_bytes: int) -> AttentionTile:
    """The tile of all kernels in fp32 and for heads wider than 128, whose scores are summed over slices."""
    first, second = head_parts(width) if width <= 128 else (128, 0)
    if element_bytes == 4:
        return AttentionTile(block(G, 32), 16, first, second, 16, 4, 1)
    return AttentionTile(block(G, 64), block(L, 64), first, second, 64, 8, 2)


def arguments(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seed: Tensor | None, num_heads: int, dropout_p: float
) -> dict[str, Any]:
    """What all launches share."""
    width = q.shape[-1] // num_heads
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "key_mask_ptr": k if key_mask is None else key_mask,
        "G": q.shape[-2],
        "L": k.shape[1],
        "H": num_heads,
        "scale": 1.0 / math.sqrt(width),
        "q_stride_b": 0 if q.ndim == 2 else q.stride(0),
        "q_stride_g": q.stride(-2),
        "q_stride_e": q.stride(-1),
        "k_stride_b": k.stride(0),
        "k_stride_l": k.stride(1),
        "k_stride_e": k.stride(2),
        "v_stride_b": v.stride(0),
        "v_stride_l": v.stride(1),
        "v_stride_e": v.stride(2),
        "key_mask_stride_b": 0 if key_mask is None else key_mask.stride(0),
        "key_mask_stride_l": 0 if key_mask is None else key_mask.stride(1),
        "WIDTH": width,
        "HAS_MASK": key_mask is not None,
        "PRECISION": dot_precision(q),
        **dropout_arguments(seed, dropout_p, k),
    }


@triton.jit
def load_part(rows_ptr, mask_rows, stride_e, first, WIDTH: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """SIZE features from `first` on of rows: (N, SIZE), 0 outside; EXACT: all of them exist."""
    offs_d = first + tl.arange(0, SIZE)
    mask = mask_rows[:, None]
    if not EXACT:
        mask = mask & (offs_d < WIDTH)[None, :]
    return tl.load(rows_ptr[:, None] + offs_d.to(tl.int64)[None, :] * stride_e, mask=mask, other=0.0)


@triton.jit
def store_part(rows_ptr, mask_rows, first, values, WIDTH: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Rounds `values` (N, SIZE) into contiguous rows."""
    offs_d = first + tl.arange(0, SIZE)
    mask = mask_rows[:, None]
    if not EXACT:
        mask = mask & (offs_d < WIDTH)[None, :]
    tl.store(rows_ptr[:, None] + offs_d[None, :], values.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(rows_ptr, mask_rows, stride_e, first, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The two parts (N, D0) and (N, D1) of the features from `first` on of rows."""
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    part0 = load_part(rows_ptr, mask_rows, stride_e, first, WIDTH, D0, EXACT)
    part1 = part0
    if D1 > 0:
        part1 = load_part(rows_ptr, mask_rows, stride_e, first + D0, WIDTH, D1, EXACT)
    return part0, part1


@triton.jit
def store_rows(
    rows_ptr, mask_rows, first, part0, part1, factor, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """Rounds two parts, times a factor, into the features from `first` on of contiguous rows."""
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    store_part(rows_ptr, mask_rows, first, part0 * factor, WIDTH, D0, EXACT)
    if D1 > 0:
        store_part(rows_ptr, mask_rows, first + D0, part1 * factor, WIDTH, D1, EXACT)


@triton.jit
def zero_rows(N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Two parts of zeros, to be added to."""
    part0 = tl.zeros((N, D0), tl.float32)
    part1 = part0
    if D1 > 0:
        part1 = tl.zeros((N, D1), tl.float32)
    return part0, part1


@triton.jit
def add_product(sum0, sum1, a, part0, part1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Two parts of sums, plus `a` times two parts of rows."""
    sum0 = tl.dot(a, part0, sum0, input_precision=PRECISION)
    if D1 > 0:
        sum1 = tl.dot(a, part1, sum1, input_precision=PRECISION)
    return sum0, sum1


@triton.jit
def _products_of_slices(
    a_rows, b_rows, mask_a, mask_b, a_stride_e, b_stride_e, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The products (BLOCK_A, BLOCK_B) of rows a and b, summed over slices of DEPTH features that are read here."""
    product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, WIDTH, DEPTH):
        a = load_part(a_rows, mask_a, a_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        b = load_part(b_rows, mask_b, b_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def products_of_parts(
    a0, a1, b0, b1, a_rows, b_rows, mask_a, mask_b, a_stride_e, b_stride_e, WIDTH: tl.constexpr, D1: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The products (BLOCK_A, BLOCK_B) of rows a and b: of their parts where DEPTH is 0, else of slices."""
    if DEPTH == 0:
        product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
        if D1 > 0:
            product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    else:
        product = _products_of_slices(
            a_rows, b_rows, mask_a, mask_b, a_stride_e, b_stride_e, WIDTH, DEPTH, PRECISION, BLOCK_A, BLOCK_B
        )
    return product


@triton.jit
def products_of_rows(
    a0, a1, a_rows, b_rows, mask_a, mask_b, a_stride_e, b_stride_e, WIDTH: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """As `products_of_parts`, of rows b that nothing else needs: a part of them is read when the one before is used."""
    if DEPTH == 0:
        EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
        b0 = load_part(b_rows, mask_b, b_stride_e, 0, WIDTH, D0, EXACT)
        product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
        if D1 > 0:
            b1 = load_part(b_rows, mask_b, b_stride_e, D0, WIDTH, D1, EXACT)
            product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    else:
        product = _products_of_slices(
            a_rows, b_rows, mask_a, mask_b, a_stride_e, b_stride_e, WIDTH, DEPTH, PRECISION, BLOCK_A, BLOCK_B
        )
    return product


@triton.jit
def delta_of_rows(
    dout0, dout1, dout_rows, out_rows, mask_g, dout_stride_e, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The sums of dout out over the features of a head; DEPTH as in `products_of_parts`."""
    if DEPTH == 0:
        EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
        out0 = load_part(out_rows, mask_g, 1, 0, WIDTH, D0, EXACT)
        delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), axis=1)
        if D1 > 0:
            out1 = load_part(out_rows, mask_g, 1, D0, WIDTH, D1, EXACT)
            delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), axis=1)
    else:
        delta = tl.zeros((BLOCK_G,), tl.float32)
        for first in range(0, WIDTH, DEPTH):
            dout = load_part(dout_rows, mask_g, dout_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
            out = load_part(out_rows, mask_g, 1, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
            delta += tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    return delta


@triton.jit
def kept(first_i, offs_l, seed, b, threshold):
    """Which weights (queries, positions) of an image survive; first_i: the number of each query's first one, uint32."""
    key0, key1 = image_keys(seed, b)
    return survives(first_i[:, None] + offs_l.to(tl.uint32)[None, :], key0, key1, threshold)


@triton.jit
def attended_of(key_mask_ptr, offs_l, mask_l, key_mask_stride_l, HAS_MASK: tl.constexpr):
    """Which positions of a tile exist and may be attended."""
    attended = mask_l
    if HAS_MASK:
        attended = tl.load(key_mask_ptr + offs_l * key_mask_stride_l, mask=mask_l, other=0) != 0
    return attended


@triton.jit
def weights_of(s, attended, lse, first_i, offs_l, seed, b, threshold, DROPOUT: tl.constexpr):
    """The weights of scores (queries, positions), those that dropout drops with a minus sign; 0 for -inf in lse.

    Only the difference is turned to base 2: it is smaller than s and lse, so less is rounded off.
    """
    below = tl.where(attended[None, :], s, float("-inf")) - tl.where(lse == float("-inf"), 0.0, lse)[:, None]
    p = tl.exp2(below * LOG2E)
    if DROPOUT:
        p = tl.where(kept(first_i, offs_l, seed, b, threshold), p, -p)
    return p


@triton.jit
def kept_weights(p, DROPOUT: tl.constexpr):
    """The weights after dropout, but for its scale, of those of `weights_of`."""
    return tl.where(p < 0.0, 0.0, p) if DROPOUT else p


@triton.jit
def ds_of(p, dp, delta, keep_scale, DROPOUT: tl.constexpr, ONE_TILE: tl.constexpr):
    """The product p (drop'(dp) - delta) for the weights of `weights_of`; ONE_TILE: delta is the sum over the tile."""
    if DROPOUT:
        dp = tl.where(p < 0.0, 0.0, dp * keep_scale)
        p = tl.abs(p)
    if ONE_TILE:
        delta = tl.sum(p * dp, axis=1)
    return p * (dp - delta[:, None])
