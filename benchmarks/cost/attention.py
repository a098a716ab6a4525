"""What the launches of query_attention cost; see products.py."""

from __future__ import annotations

import math

from mlhead.kernels._query_attention import AttentionTile
from mlhead.kernels.query_attention_backward import images_per_program

from .devices import Work
from .products import HASH, Problem, add_parts, assumed, products, width


def _depth_of(t: AttentionTile, width: int) -> int:
    """Features that a product of scores sums over, padded."""
    return t.D0 + t.D1 if t.DEPTH == 0 else math.ceil(width / t.DEPTH) * t.DEPTH


def _shared(p: Problem, t: AttentionTile, held: int, streamed: int, tile: int) -> int:
    """Bytes of `held` rows that stay, of `streamed` rows for every stage, and of `tile` scores; with slices, of one."""
    columns = t.DEPTH or t.D0 + t.D1
    return p.element_bytes * ((0 if t.DEPTH else held * columns) + streamed * columns * t.num_stages + tile)


def attention_forward(p: Problem, t: AttentionTile, vector: bool) -> Work:
    """B H ceil(G / BLOCK_G) slices programs of ceil(L / BLOCK_L) steps: s = q k^T, out += p v, 20 operations a score.

    Memory: q, k, v and out once. L2, for a program: its queries, all positions of k and v of its head.
    """
    B, L, E, G, H = p["B"], p["L"], p["E"], p["G"], p.dims.get("heads", 8)
    W, D = E // H, t.D0 + t.D1
    slices, steps = t.slices(W), math.ceil(L / t.BLOCK_L)
    g = min(G, t.BLOCK_G)
    made = products(p, t.num_warps, (steps, t.BLOCK_G, t.BLOCK_L, _depth_of(t, W)), (steps, t.BLOCK_G, D, t.BLOCK_L))
    numbers = float(steps * t.BLOCK_G * t.BLOCK_L)
    slice_w = min(W, D)
    again = steps if t.DEPTH else 1
    held = t.BLOCK_G if p.device.capability >= 90 else 0
    sums = t.BLOCK_G * (D + 1.5 * t.BLOCK_L)
    return Work(
        "query_attention_forward_kernel", "forward_tile", B * H * math.ceil(G / t.BLOCK_G) * slices, t.num_warps,
        assumed(p, t.num_warps, sums, t.BLOCK_G * D, _shared(p, t, held, 2 * t.BLOCK_L, 0)),
        p.element_bytes * (G * E + 2 * B * L * E + B * G * E) + 4.0 * B * H * G,
        p.element_bytes * (g * W * again + L * (W + slice_w) + g * slice_w), made.matrix, made.rate,
        numbers * (20.0 + (HASH if p.dims.get("dropout") else 0.0)),
        (t.BLOCK_G * D * (again + 1) + 2 * steps * t.BLOCK_L * D) / width(p, vector), made.shared, steps + 1.0,
        t.num_stages - 1,
    )  # fmt: skip


def attention_backward(p: Problem, t: AttentionTile, vector: bool) -> list[Work]:
    """ceil(B / images) H ceil(G / BLOCK_G) slices programs of images ceil(L / BLOCK_L) steps of five products.

    Three where dk and dv have a kernel of their own. Memory: dout, q, k, v once, out only where a tile does not hold
    all positions; dk, dv, and the fp32 parts of dq written and read. 25 operations a score.
    """
    B, L, E, G, H = p["B"], p["L"], p["E"], p["G"], p.dims.get("heads", 8)
    W, D = E // H, t.D0 + t.D1
    together = t.BLOCK_G >= G
    shared_q = not p.dims.get("per_image", False)
    images = images_per_program(B, G, H) if shared_q else 1
    runs, slices, steps = math.ceil(B / images), t.slices(W), math.ceil(L / t.BLOCK_L)
    g, slice_w = min(G, t.BLOCK_G), min(W, D)
    depth = _depth_of(t, W)
    turns = images * steps
    results = [(turns, t.BLOCK_G, D, t.BLOCK_L)]
    if together:
        results.append((2 * turns, t.BLOCK_L, D, t.BLOCK_G))
    made = products(p, t.num_warps, (2 * turns, t.BLOCK_G, t.BLOCK_L, depth), *results)
    numbers = float(turns * t.BLOCK_G * t.BLOCK_L)
    reads_out = 0 if steps == 1 else 1
    again = steps if t.DEPTH else 1
    dram = p.element_bytes * (G * E + (1 + reads_out) * B * G * E + (4 if together else 2) * B * L * E)
    cache = p.element_bytes * images * (g * W * (1 + reads_out) * again + (4 if together else 2) * L * slice_w)
    accesses = t.BLOCK_G * D * images * (1 + reads_out) * again + turns * (4 if together else 2) * t.BLOCK_L * D
    sums = t.BLOCK_G * D + 3 * t.BLOCK_G * t.BLOCK_L + t.BLOCK_L * D
    held = t.BLOCK_G * (2 if p.device.capability >= 90 else 1)
    work = Work(
        "query_attention_backward_kernel", "backward_tile", runs * H * math.ceil(G / t.BLOCK_G) * slices, t.num_warps,
        assumed(p, t.num_warps, sums, 2 * t.BLOCK_G * D, _shared(p, t, held, 2 * t.BLOCK_L, t.BLOCK_G * t.BLOCK_L)),
        dram + 4.0 * runs * G * E, cache + 4.0 * g * slice_w, made.matrix, made.rate,
        numbers * (25.0 + (HASH if p.dims.get("dropout") else 0.0)), accesses / width(p, vector), made.shared,
        images * (steps + 1.0), t.num_stages - 1,
    )  # fmt: skip
    return [work, *(add_parts(p, runs, G * E) if shared_q else [])]


def attention_keys(p: Problem, t: AttentionTile, vector: bool) -> Work:
    """B H ceil(L / BLOCK_L) slices programs of ceil(G / BLOCK_G) steps of four products: s, dp, dv, dk.

    Memory: what the kernel of dq has read comes from it again, dk and dv are written once.
    """
    B, L, E, G, H = p["B"], p["L"], p["E"], p["G"], p.dims.get("heads", 8)
    W, D = E // H, t.D0 + t.D1
    slices, steps, length = t.slices(W), math.ceil(G / t.BLOCK_G), min(L, t.BLOCK_L)
    made = products(
        p, t.num_warps, (2 * steps, t.BLOCK_G, t.BLOCK_L, _depth_of(t, W)), (2 * steps, t.BLOCK_L, D, t.BLOCK_G)
    )
    numbers = float(steps * t.BLOCK_G * t.BLOCK_L)
    reads_out = 0 if t.BLOCK_L >= L else 1
    sums = 2 * t.BLOCK_L * D + 3 * t.BLOCK_G * t.BLOCK_L
    held = t.BLOCK_L * (2 if p.device.capability >= 90 else 1)
    return Work(
        "query_attention_keys_backward_kernel", "keys_tile", B * H * math.ceil(L / t.BLOCK_L) * slices, t.num_warps,
        assumed(p, t.num_warps, sums, 2 * t.BLOCK_L * D, _shared(p, t, held, 2 * t.BLOCK_G, t.BLOCK_G * t.BLOCK_L)),
        p.element_bytes * (G * E + (1 + reads_out) * B * G * E + 4.0 * B * L * E),
        p.element_bytes * (4 * length + (2 + reads_out) * G) * min(W, D), made.matrix, made.rate,
        numbers * (25.0 + (HASH if p.dims.get("dropout") else 0.0)),
        (4 * t.BLOCK_L * D + (2 + reads_out) * steps * t.BLOCK_G * D) / width(p, vector), made.shared, steps + 1.0,
        t.num_stages - 1,
    )  # fmt: skip
