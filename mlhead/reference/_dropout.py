"""The counter-based dropout: the same mask for the same seed, on any device and backend."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The lowbias32 hash of numbers in [0, 2^32), in int64 arithmetic: keys only, so speed does not matter."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _int32(x: Tensor) -> Tensor:
    """Numbers in [0, 2^32) as the int32 of the same bits."""
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    """The step x ^ (x >>> bits): torch shifts int32 arithmetically, so the copies of the sign are masked off."""
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))


def keep_mask(seed: Tensor, dropout_p: float, B: int, H: int, G: int, L: int) -> Tensor:
    """Which numbers survive: bool (B, H, G, L), each True with probability 1 - dropout_p.

    For the attention weights of H heads, G queries and L positions; other ops say what their axes are here.

    With i = (h G + g) L + l and two keys per image, key0 = mix(mix(seed_lo + b) + seed_hi) and key1 = mix(key0 + 1),
    all in 32-bit unsigned arithmetic:

        u = i + key0;  u ^= u >> 16;  u *= 0x7feb352d;  u ^= key1;  u ^= u >> 15;  u *= 0x846ca68b;  u ^= u >> 16
        keep = u >= floor(dropout_p 2^32)

    Source: the hash is Wellons' lowbias32 ("Prospecting for hash functions", 2018) with a key between its rounds.
    """
    image = torch.arange(B, device=seed.device)
    key0 = _mix((_mix(((seed & _MASK) + image) & _MASK) + ((seed >> 32) & _MASK)) & _MASK)
    key1 = _mix((key0 + 1) & _MASK)
    i = torch.arange(H * G * L, device=seed.device) & _MASK
    u = _int32(i)[None, :] + _int32(key0)[:, None]
    u = (_xor_shift(u, 16) * 0x7FEB352D) ^ _int32(key1)[:, None]
    u = _xor_shift(_xor_shift(u, 15) * (0x846CA68B - (1 << 32)), 16)
    # Unsigned comparison: flipping the sign bit maps the order of uint32 to that of int32.
    threshold = min(int(dropout_p * 2.0**32), _MASK) - (1 << 31)
    return ((u ^ -(1 << 31)) >= threshold).view(B, H, G, L)


def factors(
    seed: Tensor | None, dropout_p: float, B: int, H: int, G: int, L: int, *, dtype: torch.dtype
) -> Tensor | None:
    """What dropout multiplies by, 0 or 1 / (1 - dropout_p), (B, H, G, L); None where nothing is dropped."""
    if dropout_p == 0.0 or seed is None:
        return None
    return keep_mask(seed, dropout_p, B, H, G, L).to(dtype) / (1.0 - dropout_p)
