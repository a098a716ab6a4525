"""Random numbers that depend on nothing but their address: the same in any order, batch or worker."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64, elementwise on an array: every input bit reaches every output bit.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: int) -> int:
    """One 64-bit key from several whole numbers, e.g. a seed and the number of a split."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key + np.uint64(part % 2**64) + _GOLDEN)
    return int(key[0])


class Draws:
    """Rows of random numbers, one for each of B serials; draw n of a row is a pure function of (key, serial, n)."""

    def __init__(self, key: int, serials: NDArray[np.int64]) -> None:
        self._rows = mix(serials.astype(np.uint64) * _GOLDEN + np.array(key, np.uint64))
        self._next = 0

    def bits(self, *shape: int) -> NDArray[np.uint64]:
        """(B, *shape) uniform 64-bit numbers."""
        count = int(np.prod(shape))
        addresses = np.arange(self._next, self._next + count, dtype=np.uint64) * _GOLDEN + np.uint64(1)
        self._next += count
        return mix(self._rows[:, None] ^ mix(addresses)[None, :]).reshape(len(self._rows), *shape)

    def integers(self, below: int | NDArray[np.int64], *shape: int) -> NDArray[np.int64]:
        """(B, *shape) uniform whole numbers in [0, below); `below` < 2^31, a number or an array that broadcasts."""
        high = self.bits(*shape) >> np.uint64(32)
        return ((high * np.asarray(below).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """(B, *shape) uniform numbers in [0, 1)."""
        return (self.bits(*shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
