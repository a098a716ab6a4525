"""What the launches of the kernels without matrix products cost: norm, ReLU and losses; see products.py."""

from __future__ import annotations

import math

from mlhead.kernels import _class_loss, _device, dropout_add_layer_norm_backward, relu_dropout
from mlhead.kernels._dropout_add_layer_norm import RowTile

from .devices import Resources, Work
from .products import HASH, Problem, assumed, torch_pass, width

LOSS_OPERATIONS = {"bce": 45.0, "asl": 100.0, "softmax": 25.0}


def norm_forward(p: Problem, t: RowTile) -> Work:
    """ceil(B N / BLOCK_R) programs; x and residual read, out written. 12 operations a number.

    A row of several warps is summed twice through shared memory, a fifth of a round each.
    """
    rows, E = p["B"] * p["N"], p["E"]
    rounds = 2 * math.ceil(E / t.BLOCK_E) if E > t.BLOCK_E else 1
    numbers = float(t.BLOCK_R * t.BLOCK_E * rounds)
    barriers = 0.4 if t.num_warps > t.BLOCK_R else 0.0
    return Work(
        "dropout_add_layer_norm_forward_kernel", "forward_tile", math.ceil(rows / t.BLOCK_R), t.num_warps,
        assumed(p, t.num_warps, 1.5 * t.BLOCK_R * t.BLOCK_E, 0, 512), p.element_bytes * 3.0 * rows * E,
        p.element_bytes * min(t.BLOCK_R, rows) * E * (3 if rounds == 1 else 5), lanes=numbers * (12.0 + HASH),
        accesses=3 * numbers / width(p, E % 16 == 0), rounds=rounds + barriers,
    )  # fmt: skip


def norm_backward(p: Problem, t: RowTile) -> list[Work]:
    """ceil(B N / rows of a run) programs of one tile after another; dout, x, residual read, dx and dresidual written.

    The fp32 parts of dweight and dbias are written and summed. 25 operations a number; rows of several warps as in
    forward.
    """
    rows, E = p["B"] * p["N"], p["E"]
    run = dropout_add_layer_norm_backward.rows_per_run(rows, E, t)
    runs = math.ceil(rows / run)
    again = 2 * math.ceil(E / t.BLOCK_E) if E > t.BLOCK_E else 1
    steps = run // t.BLOCK_R * again
    numbers = float(steps * t.BLOCK_R * t.BLOCK_E)
    barriers = 0.4 if t.num_warps > t.BLOCK_R else 0.0
    work = Work(
        "dropout_add_layer_norm_backward_kernel", "backward_tile", runs, t.num_warps,
        assumed(p, t.num_warps, 3 * t.BLOCK_R * t.BLOCK_E + 2 * t.BLOCK_E, 0, 1024),
        p.element_bytes * 5.0 * rows * E + 8.0 * runs * E,
        p.element_bytes * 5.0 * min(rows, run) * E + 8.0 * E, lanes=numbers * (25.0 + HASH),
        accesses=5 * numbers / width(p, E % 16 == 0), rounds=steps * (1 + barriers),
    )  # fmt: skip
    rounding = [torch_pass("round", 6.0 * E, times=2)] if p.element_bytes != 4 else []
    return [work, torch_pass("sum of parts", 4.0 * (runs + 1) * E, times=2), *rounding]


def relu(p: Problem, t: relu_dropout.FlatTile, backward: bool) -> Work:
    """ceil(B / BLOCK_R) ceil(N F / BLOCK_M) programs of one tile: 2 tensors forward, 3 backward."""
    B, M = p["B"], p["N"] * p["F"]
    numbers = float(t.BLOCK_R * t.BLOCK_M)
    tensors = 3 if backward else 2
    programs = math.ceil(B / t.BLOCK_R) * math.ceil(M / t.BLOCK_M)
    moved = float(p.element_bytes * tensors * B * M)
    return Work(
        f"relu_dropout_{'backward' if backward else 'forward'}_kernel", "flat_tile", programs, t.num_warps,
        assumed(p, t.num_warps, numbers * p.element_bytes / 8, 0, 0), moved, moved / programs,
        lanes=numbers * (3.0 if backward else 3.0 + HASH), accesses=tensors * numbers / width(p, M % 16 == 0),
    )  # fmt: skip


def loss_kernel(
    p: Problem, t: _class_loss.LossTile, g: int, n: int, loss: str, statistics: bool, times: int = 1
) -> Work:
    """B programs, times the splits of an image's tiles; logits of the block, in L2, read and (gradient) written.

    45, 100 and 25 operations a logit of BCE, ASL and softmax; four rounds of the search for sparse targets.
    """
    B = p["B"]
    device = _device.Device(p.device.capability, p.device.multiprocessors, p.device.program_bytes)
    tiles = t.tiles(g, n)
    steps = _class_loss.tiles_per_program(tiles, B, device)
    splits = math.ceil(tiles / steps)
    tile = t.BLOCK_I * t.BLOCK_N
    numbers = float(steps * tile)
    moved = 1 if statistics else 2
    per_thread = {"bce": 5.0, "asl": 12.0, "softmax": 5.0}[loss]
    resources = assumed(p, t.num_warps, per_thread * tile, 0, 256)
    if resources.registers > t.maxnreg:  # ptxas would spill
        resources = Resources(256, 256)
    return Work(
        "class_loss_statistics_kernel" if statistics else "class_loss_gradient_kernel", "loss_tile", B * splits,
        t.num_warps, resources, 0.0, p.element_bytes * moved * g * n / splits,
        lanes=numbers * (15.0 if statistics else LOSS_OPERATIONS[loss]),
        accesses=moved * numbers / width(p, n % 8 == 0), rounds=steps + 4.0, times=times,
    )  # fmt: skip
