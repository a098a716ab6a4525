"""What a Triton kernel's launch costs, from shape and launch configuration: group_fc, csra_pool, what all share.

Attention is in attention.py, kernels without products in rows.py.

Matrix products and plain operations are counted with the padding of their tiles; bytes without, since masked loads move
nothing. Operations per element are counted by eye from the kernels, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlhead.kernels import _device, csra_pool, csra_pool_fused, group_fc_backward
from mlhead.kernels._group_fc import Tile

from .devices import ASSUMED, Device, Resources, Work

HASH = 12.0  # operations of one element's dropout
KEPT_BYTES = 40 << 20  # that L2 keeps from one kernel to the next; by the same measurements as devices.py


@dataclass(frozen=True)
class Problem:
    """One op on one shape, in one dtype, on one device.

    Args:
        dims: The sizes, by the letters of the case.
        element_bytes: 2 or 4.
        device: Where.
        tf32: Whether fp32 products may use TF32.
    """

    dims: Mapping[str, Any]
    element_bytes: int
    device: Device
    tf32: bool = False

    def __getitem__(self, letter: str) -> Any:
        return self.dims[letter]


@dataclass(frozen=True)
class Products:
    """The matrix products of one program: FLOP over the share of the peak, the peak, bytes of shared memory."""

    matrix: float
    rate: str
    shared: float


def products(p: Problem, warps: int, *shapes: tuple[float, int, int, int]) -> Products:
    """Of (count, m, n, k): 2 m n k FLOP each over the share that the instruction reaches.

    That is triton_share; times older_share where from sm_90 on the newer instruction, of 64 rows and 4 warps, cannot be
    had. An operand goes into shared memory once, the left one comes out of it once for 256 columns, the right one once
    for 64 rows. In fp32 without TF32 the lanes multiply.
    """
    rate = "tensor" if p.element_bytes == 2 else "tf32" if p.tf32 else "lanes"
    matrix = shared = 0.0
    for count, m, n, k in shapes:
        share = ASSUMED.triton_share
        if rate != "lanes" and p.device.capability >= 90 and (m < 64 or warps % 4):
            share *= ASSUMED.older_share
        matrix += count * 2.0 * m * n * k / share
        read = m * math.ceil(n / 256) + n * math.ceil(m / 64)
        shared += count * k * p.element_bytes * (m + n + read)
    return Products(matrix, rate, shared)


def assumed(p: Problem, warps: int, sums: float, operands: float, shared: int) -> Resources:
    """Registers of a thread: base + the fp32 sums + the operands twice; shared memory as given.

    Operands are in registers before sm_90 and in fp32 (once). Fitted by eye to what Triton compiles for the shipped
    configurations in 16 bits, with which `python -m benchmarks.tune --dry-run` compares a candidate; from 256 on a
    program is taken to spill.
    """
    held = sums
    if p.element_bytes == 4:
        held += operands
    elif p.device.capability < 90:
        held += operands * p.element_bytes / 2
    if p.device.capability >= 100:
        held *= 0.75  # the sums leave registers during the loop
    return Resources(round(ASSUMED.base_registers + held / (32 * warps)), shared)


def width(p: Problem, vector: bool) -> int:
    """Elements of one access of a thread: 16 bytes, or one element."""
    return 16 // p.element_bytes if vector else 1


def _three(p: Problem) -> tuple[int, int, int, int, int]:
    G, C = p["G"], p["C"]
    return p["B"], G, p["E"], math.ceil(C / G), C


def _tile_product(
    p: Problem, kernel: str, tile: Any, m: int, n: int, k: int, steps: int, programs: int, cache: float, dram: float,
    vector: bool,
) -> Work:  # fmt: skip
    """A loop of `steps` products (m, k) (k, n) that ends in one tile (m, n)."""
    made = products(p, tile.num_warps, (steps, m, n, k))
    # Before sm_90 the operands of the product under way have left it.
    stages = max(1, tile.num_stages - (p.device.capability < 90 or not vector))
    shared = stages * (m + n) * k * p.element_bytes
    accesses = steps * (m + n) * k / width(p, vector) + m * n / width(p, vector)
    addresses = 0 if vector else 2 * (m + n) * min(k, 32)  # each element has one, and a mask
    return Work(
        kernel, "", programs, tile.num_warps, assumed(p, tile.num_warps, m * n + addresses, (m + n) * k, shared),
        dram, cache, made.matrix, made.rate, 4.0 * m * n, accesses, made.shared, steps, tile.num_stages - 1,
    )  # fmt: skip


def group_fc_forward(p: Problem, t: Tile, vector: bool) -> Work:
    """G ceil(J / BLOCK_J) ceil(B / BLOCK_B) programs of ceil(E / BLOCK_E) products of the tile.

    Memory: h, weight, bias and logits once. L2, for a program: (b + j) E elements read, b j written.
    """
    B, _, E, J, C = _three(p)
    groups = math.ceil(C / J)
    tiles = math.ceil(J / t.BLOCK_J) * math.ceil(B / t.BLOCK_B)
    b, j = min(B, t.BLOCK_B), min(J, t.BLOCK_J)
    dram = p.element_bytes * (B * groups * E + E * C + C + B * C)
    cache = p.element_bytes * ((b + j) * E + b * j)
    steps = math.ceil(E / t.BLOCK_E)
    return _tile_product(
        p, "group_fc_forward_kernel", t, t.BLOCK_B, t.BLOCK_J, t.BLOCK_E, steps, groups * tiles, cache, dram, vector
    )


def _parts(programs: int, steps: int, p: Problem, block: int, size: int) -> tuple[int, int]:
    """Parts of a split loop, and the steps of each, as the launchers cut it."""
    device = _device.Device(p.device.capability, p.device.multiprocessors, p.device.program_bytes)
    split = math.ceil(steps / group_fc_backward.splits(programs, steps, device)) * block
    return math.ceil(size / split), split // block


def group_fc_dh(p: Problem, t: Tile, vector: bool) -> list[Work]:
    """Parts G ceil(E / BLOCK_E) ceil(B / BLOCK_B) programs of their share of ceil(J / BLOCK_J) products.

    Memory: dlogits, weight and dh once, and where the loop is split its fp32 parts written, read and rounded.
    """
    B, G, E, J, C = _three(p)
    programs = G * math.ceil(E / t.BLOCK_E) * math.ceil(B / t.BLOCK_B)
    parts, steps = _parts(programs, math.ceil(J / t.BLOCK_J), p, t.BLOCK_J, J)
    b, e, deep = min(B, t.BLOCK_B), min(E, t.BLOCK_E), min(J, steps * t.BLOCK_J)
    size = p.element_bytes if parts == 1 else 4
    dram = p.element_bytes * (B * C + E * C) + size * parts * B * G * E
    cache = p.element_bytes * (b + e) * deep + size * b * e
    work = _tile_product(
        p, "group_fc_dh_kernel", t, t.BLOCK_B, t.BLOCK_E, t.BLOCK_J, steps, programs * parts, cache, dram, vector
    )
    return [work, *add_parts(p, parts, B * G * E)]


def group_fc_dweight(p: Problem, t: Tile, vector: bool) -> list[Work]:
    """Parts G ceil(E / BLOCK_E) ceil(J / BLOCK_J) programs of their share of ceil(B / BLOCK_B) products.

    Memory: dlogits, h and dweight once, and where the loop is split its fp32 parts written, read and rounded.
    """
    B, G, E, J, C = _three(p)
    programs = G * math.ceil(E / t.BLOCK_E) * math.ceil(J / t.BLOCK_J)
    parts, steps = _parts(programs, math.ceil(B / t.BLOCK_B), p, t.BLOCK_B, B)
    e, j, deep = min(E, t.BLOCK_E), min(J, t.BLOCK_J), min(B, steps * t.BLOCK_B)
    size = p.element_bytes if parts == 1 else 4
    dram = p.element_bytes * (B * C + B * G * E) + size * parts * (G * E * J + C)
    cache = p.element_bytes * (e + j) * deep + size * e * j
    work = _tile_product(
        p, "group_fc_dweight_kernel", t, t.BLOCK_E, t.BLOCK_J, t.BLOCK_B, steps, programs * parts, cache, dram, vector
    )
    return [work, *add_parts(p, parts, G * E * J)]


def torch_pass(kernel: str, moved: float, times: int = 1) -> Work:
    """A kernel of torch that reads and writes `moved` bytes and does little else, 16 KB to a program."""
    programs = max(1, math.ceil(moved / 16384))
    return Work(kernel, "", programs, 4, Resources(32, 0), moved, moved / programs, times=times)


def add_parts(p: Problem, parts: int, size: int) -> list[Work]:
    """The fp32 parts of a result summed by torch, and rounded in another pass unless the result is fp32."""
    if parts == 1:
        return []
    rounding = [torch_pass("round", (4 + p.element_bytes) * size)] if p.element_bytes != 4 else []
    return [torch_pass("sum of parts", 4.0 * (parts + 1) * size), *rounding]


def vendor_product(p: Problem, m: int, n: int, k: int, dram: float, times: int = 1, batch: int = 1) -> Work:
    """A product (m, k) (k, n), or a batch of them, by the vendor's library, in tiles of 128 by 128.

    From sm_90 on of 128 by 256, by pairs of programs that read the wider operand from L2 once for both. Where tiles are
    fewer than multiprocessors, k is split, and the parts are added up in L2.
    """
    rate = "tensor" if p.element_bytes == 2 else "tf32" if p.tf32 else "lanes"
    wide = 256 if p.device.capability >= 90 and min(m, n) > 128 and rate != "lanes" else 128
    m, n = max(m, n), min(m, n)
    tiles = max(1, batch * math.ceil(m / 128) * math.ceil(n / wide))
    splits = max(1, min(p.device.multiprocessors // tiles, k // 512))
    sums = min(m, 128) * min(n, wide)
    cache = p.element_bytes * (k / splits * (min(m, 128) + min(n, wide) * 128 / wide) + sums)
    cache += 8.0 * sums if splits > 1 else 0.0
    matrix = 2.0 * 128 * wide * k / splits / ASSUMED.vendor_share
    return Work(
        "product", "", tiles * splits, 8, Resources(168, 96 << 10), batch * dram, cache, matrix, rate,
        rounds=math.ceil(k / splits / 64), depth=3, times=times,
    )  # fmt: skip


def csra_fused(p: Problem, t: csra_pool_fused.FusedTile) -> Work:
    """ceil(B L / BLOCK_R) ceil(N / BLOCK_N) programs of ceil(D / BLOCK_D) products, then 6 operations a score.

    And 16 for each group of neighbours that are of one image for certain.

    Memory: x and the weight once, and four fp32 facts of each image, tile and column.
    """
    B, L, D, N = p["B"], p["L"], p["D"], p["H"] * p["C"]
    steps = math.ceil(D / t.BLOCK_D)
    programs = math.ceil(B * L / t.BLOCK_R) * math.ceil(N / t.BLOCK_N)
    facts = 16.0 * B * csra_pool_fused.parts(L, t.BLOCK_R) * N
    dram = p.element_bytes * (B * L * D + N * D) + facts
    cache = p.element_bytes * (min(B * L, t.BLOCK_R) + min(N, t.BLOCK_N)) * D + facts / programs
    work = _tile_product(
        p, "csra_fused_forward_kernel", t, t.BLOCK_R, t.BLOCK_N, t.BLOCK_D, steps, programs, cache, dram, True
    )
    lanes = t.BLOCK_R * t.BLOCK_N * (6.0 + 16.0 / csra_pool_fused.aligned(L))
    pooling = assumed(p, t.num_warps, 2.2 * t.BLOCK_R * t.BLOCK_N, 0, 0)
    taken = replace(work.resources, registers=max(work.resources.registers, pooling.registers))
    return replace(work, lanes=lanes, site="fused_tile", resources=taken)


def beyond_cache(moved: float) -> float:
    """What of so many bytes comes from memory: all where L2 does not hold them."""
    return moved if moved > KEPT_BYTES else 0.0


def csra_pool_scores(
    p: Problem, t: csra_pool.PoolTile, images: int, columns: int, backward: bool, times: int = 1
) -> Work:
    """`images` ceil(columns / BLOCK_N) programs of ceil(L / BLOCK_L) tiles, which wait for one another.

    Scores are read once, from L2 if it holds them; backward reads them again and writes their gradient. 25 operations
    a score, backward 45.
    """
    L = p["L"]
    memory = beyond_cache((2.0 if backward else 1.0) * p.element_bytes * images * L * columns)
    steps = math.ceil(L / t.BLOCK_L)
    passes = 3 if backward else 1
    n = min(columns, t.BLOCK_N)
    numbers = float(steps * t.BLOCK_L * t.BLOCK_N)
    tile = t.BLOCK_L * t.BLOCK_N
    vector = columns % 16 == 0
    return Work(
        "csra_pool_scores_backward_kernel" if backward else "csra_pool_scores_kernel",
        "pool_tile", images * math.ceil(columns / t.BLOCK_N), t.num_warps,
        assumed(p, t.num_warps, 1.5 * tile + t.BLOCK_N * (8 if p["H"] == 1 else 108), 0, 4 * t.BLOCK_N * t.num_warps),
        memory, p.element_bytes * passes * L * n + 4.0 * n, lanes=numbers * (45.0 if backward else 25.0),
        accesses=passes * numbers / width(p, vector), rounds=steps * (2 if backward else 1), times=times,
    )  # fmt: skip


def csra_merge(p: Problem, rows: int) -> Work:
    """B ceil(C / block) programs read the facts of each tile of `rows` positions that an image touches, one by one.

    All heads of a class at a time; logits are written.
    """
    B, L, H, C = p["B"], p["L"], p["H"], p["C"]
    parts = csra_pool_fused.parts(L, rows)
    programs = B * math.ceil(C / csra_pool_fused.merged_classes(H)[1])
    written = float(p.element_bytes * B * C)
    moved = B * H * C * 16.0 * parts + written
    return Work("csra_merge_facts_kernel", "", programs, 4, Resources(64, 0), written, moved / programs, rounds=parts)
