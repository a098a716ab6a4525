"""How large the chunks of csra_pool are: a cost model of what they read and write, with a machine's numbers as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """What the sizes of chunks are chosen by.

    Args:
        cache_bytes: Scores of a chunk up to this many bytes stay in the cache between the kernels.
        scratch_bytes: The most bytes of the scores of a chunk.
        kept_bytes: The most bytes of all scores that are kept for backward.
        flops: Rate of a large matrix product.
        bandwidth: Bytes per second from memory.
        launch_s: Seconds that a chunk costs besides.
        half: Rows or columns at which a product reaches half of its rate.
    """

    cache_bytes: int
    scratch_bytes: int
    kept_bytes: int
    flops: float
    bandwidth: float
    launch_s: float
    half: int

    def for_pooling(self) -> Machine:
        """With chunks that stay in the cache."""
        return replace(self, scratch_bytes=self.cache_bytes)


MACHINES = {
    # Rate and bandwidth of two cores of an AMD EPYC, as `make bench` measured them; the rest is assumed.
    "cpu": Machine(8 << 20, 8 << 20, 8 << 20, 170e9, 25e9, 20e-6, 24),
    # Assumed for an H100 (its L2 holds 50 MB); not yet measured on a GPU. By the model of benchmarks/cost keeping the
    # scores for backward pays at openimages with L = 196, 460 MiB, too: how much memory it is worth is a choice.
    "cuda": Machine(24 << 20, 128 << 20, 128 << 20, 700e12, 3.0e12, 15e-6, 96),
}


class Plan(NamedTuple):
    """The most images and columns of a chunk."""

    images: int
    columns: int


@lru_cache(maxsize=1024)
def plan_chunks(B: int, L: int, D: int, N: int, element_bytes: int, most_images: int, machine: Machine) -> Plan:
    """The cheapest chunks whose scores fit the scratch.

    Every range of columns reads x, and its product adds to dx; every range of images reads the weight, and adds to dw.
    So the larger of the two matrices should be the one that is read once.
    """

    def seconds(plan: Plan) -> float:
        ranges_n, ranges_b = math.ceil(N / plan.columns), math.ceil(B / plan.images)
        rows = plan.images * L
        rate = machine.flops * rows / (rows + machine.half) * plan.columns / (plan.columns + machine.half)
        x, weight = B * L * D * element_bytes, N * D * element_bytes
        # Read by three products; what is added to is read and written in fp32.
        traffic = 3 * (x * ranges_n + weight * ranges_b)
        traffic += 8 * B * L * D * (ranges_n if ranges_n > 1 else 0) + 8 * N * D * (ranges_b if ranges_b > 1 else 0)
        if plan.images * L * plan.columns * element_bytes > machine.cache_bytes:
            traffic += 2 * B * L * N * element_bytes  # of the kernel that pools; the products hide theirs
        return 6 * B * L * N * D / rate + traffic / machine.bandwidth + machine.launch_s * ranges_n * ranges_b

    found = []
    for scratch in (min(machine.cache_bytes, machine.scratch_bytes), machine.scratch_bytes):
        most = scratch // element_bytes
        for parts in sorted({*range(1, 33), *(round(32 * 1.25**i) for i in range(64))}):
            columns = math.ceil(N / parts)
            images = max(1, min(B, most_images, most // (L * columns)))
            if images * L * columns <= most or columns == 1:
                found.append(Plan(math.ceil(B / math.ceil(B / images)), columns))
    # A single image's single column may be larger than the scratch: then that is the chunk.
    return min(found or [Plan(1, 1)], key=seconds)


def is_matrix(x: Tensor) -> bool:
    """Whether all positions of all images (B, L, D) are the rows of one matrix."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def is_copied(x: Tensor) -> bool:
    """Whether images (B, L, D) are copied, a range of them at a time, before they are multiplied.

    Where an image's positions and features are no matrix that a library multiplies as it lies; and on a GPU also where
    the positions of all images are no rows of one matrix: a product for each image would cost more than the copy.
    """
    (_, L, D), (_, along_l, along_d) = x.shape, x.stride()
    dense = (along_d == 1 and (along_l >= D or L == 1)) or (along_l == 1 and (along_d >= L or D == 1))
    return not dense or (x.device.type == "cuda" and not is_matrix(x))


def is_rows(weight: Tensor) -> bool:
    """Whether the classifiers (H, C, D) of all heads are the rows of one matrix."""
    return weight.shape[0] == 1 or weight.stride(0) == weight.shape[1] * weight.stride(1)


def _machine(x: Tensor) -> Machine:
    return MACHINES["cuda" if x.device.type == "cuda" else "cpu"]


def _score_bytes(x: Tensor, weight: Tensor) -> int:
    return x.shape[0] * x.shape[1] * weight.shape[0] * weight.shape[1] * x.element_size()


def fits_the_scratch(x: Tensor, weight: Tensor) -> bool:
    """Whether all scores are so few that one chunk has them; a function of the shapes alone."""
    return _score_bytes(x, weight) <= _machine(x).scratch_bytes


def may_be_kept(x: Tensor, weight: Tensor) -> bool:
    """Whether all scores are so few that they are kept for a backward; a function of the shapes alone."""
    return _score_bytes(x, weight) <= _machine(x).kept_bytes


def chunk_plan(x: Tensor, weight: Tensor, keep: bool, pools_only: bool = False) -> Plan:
    """The sizes of the chunks; all columns at once where the scores are kept. What `pools_only`, and adds to no
    gradient, gains nothing by chunks larger than the cache.
    """
    (B, L, D), (H, C, _) = x.shape, weight.shape
    machine = _machine(x).for_pooling() if pools_only else _machine(x)
    most_images = B
    if is_copied(x):
        most_images = min(B, max(1, machine.scratch_bytes // max(1, L * D * x.element_size())))
    if keep:
        plan = Plan(most_images, H * C)
    else:
        plan = plan_chunks(B, L, max(D, 1), H * C, x.element_size(), most_images, machine)
    return plan if is_rows(weight) else Plan(plan.images, min(plan.columns, C))
