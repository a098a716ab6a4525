"""Which launches a pass of an op makes, as launchers in mlhead/ops and kernels/ do, any answer of a site replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from mlhead.ops import _csra_plan, _loss_chunks

from . import attention, products, rows
from .devices import Work
from .products import Problem
from .sites import BY_TITLE, Picker, kernel_device

Passes = dict[str, list[Work]]


def _group_fc(p: Problem, pick: Picker) -> Passes:
    B, E, C = p["B"], p["E"], p["C"]
    J, device = math.ceil(C / p["G"]), kernel_device(p.device)
    facts = (B, E, J, p.element_bytes)
    h, weight, dlogits = E % 16 == 0, J % 16 == 0, C % 16 == 0
    forward = pick("group_fc.forward_tile", *facts, h and weight, device)
    dh = pick("group_fc_backward.dh_tile", *facts, dlogits and weight, device)
    dweight = pick("group_fc_backward.dweight_tile", *facts, dlogits and h, device)
    return {
        "forward": [replace(products.group_fc_forward(p, forward, h and weight), site="forward_tile")],
        "backward": [
            *_labelled("dh_tile", products.group_fc_dh(p, dh, dlogits and weight)),
            *_labelled("dweight_tile", products.group_fc_dweight(p, dweight, dlogits and h)),
        ],
    }


def _labelled(site: str, works: list[Work]) -> list[Work]:
    return [replace(work, site=site) for work in works]


def _chunks(plan: _csra_plan.Plan, B: int, N: int) -> Iterator[tuple[int, int, int]]:
    """Images and columns of the chunks, and how many are so."""
    ranges = [(size, n) for whole, most in ((B, plan.images), (N, plan.columns)) for size, n in (_cut(whole, most),)]
    (images, several_b), (columns, several_n) = ranges
    for i, b in enumerate((images, B - images * several_b)):
        for k, n in enumerate((columns, N - columns * several_n)):
            if b > 0 and n > 0:
                yield b, n, (1 if i else several_b) * (1 if k else several_n)


def _cut(whole: int, most: int) -> tuple[int, int]:
    """The size of the whole parts, and how many there are."""
    size = min(whole, most)
    return size, whole // size


def _csra(p: Problem, pick: Picker) -> Passes:
    B, L, D, N, eb = p["B"], p["L"], p["D"], p["H"] * p["C"], p.element_bytes
    machine = _csra_plan.MACHINES["cuda"]
    device = kernel_device(p.device)
    kept = B * L * N * eb <= machine.kept_bytes
    plan = _csra_plan.plan_chunks(B, L, D, N, eb, B, machine)
    alone = _csra_plan.plan_chunks(B, L, D, N, eb, B, machine.for_pooling())
    whole = _csra_plan.Plan(B, N)
    count = math.ceil(B / alone.images) * math.ceil(N / alone.columns)
    norms = [products.torch_pass("norms", float(eb * N * D))]
    logits = [products.torch_pass("logits", (4.0 + eb) * B * N)]
    forward: list[Work]
    design = BY_TITLE["csra_pool_fused.fused_tile"].kernel_module().forward_design(B, L, D, N, eb, count)
    if design == "fused":
        tile = pick("csra_pool_fused.fused_tile", N, eb, device)
        forward = [products.csra_fused(p, tile), products.csra_merge(p, tile.BLOCK_R)]
    else:
        forward = [work for chunk in _chunks(alone, B, N) for work in _pooled(p, pick, *chunk, False)] + logits
    backward: list[Work] = []
    for b, n, times in _chunks(whole if kept else plan, B, N):
        product, pooled = _pooled(p, pick, b, n, times, True)
        backward += [pooled] if kept else [product, pooled]
        backward += _csra_gradients(p, b, n, times, plan.columns < N and not kept, plan.images < B and not kept)
    backward.append(products.torch_pass("norms' gradient", 3.0 * eb * N * D))
    found = {"forward": [*norms, *forward], "backward": [*norms, *backward]}
    if kept:  # then the forward before a backward has all scores in one chunk, whatever it is by itself
        found["both"] = [*norms, *_pooled(p, pick, B, N, 1, False), *logits, *found["backward"]]
    return found


def _csra_gradients(p: Problem, b: int, n: int, times: int, columns: bool, images: bool) -> list[Work]:
    """What the ds of a chunk of b images and n columns becomes: dx and dw.

    dx is read and written in fp32 where there are several ranges of columns, dw where there are several of images.
    """
    L, D, eb = p["L"], p["D"], p.element_bytes
    sums = (8.0 if columns else eb) * b * L * D, (8.0 if images else eb) * n * D
    dx = products.vendor_product(p, b * L, D, n, sums[0] + eb * n * D, times)
    dw = products.vendor_product(p, n, D, b * L, sums[1] + eb * b * L * D, times)
    inputs = float(eb * b * L * n)
    return [replace(dx, cache=dx.cache + inputs / dx.programs), dw]


def _pooled(p: Problem, pick: Picker, b: int, n: int, times: int, backward: bool) -> tuple[Work, Work]:
    """The product of a chunk's scores, and the kernel that pools them."""
    L, D, eb = p["L"], p["D"], p.element_bytes
    tile = pick("csra_pool.pool_tile", L, n, eb)
    written = products.beyond_cache(float(eb * b * L * n))
    product = products.vendor_product(p, b * L, n, D, float(eb * D * (b * L + n)) + written, times)
    return product, products.csra_pool_scores(p, tile, b, n, backward, times)


def _attention(p: Problem, pick: Picker) -> Passes:
    E, G, L, H = p["E"], p["G"], p["L"], p.dims.get("heads", 8)
    W = E // H
    vector = W % 16 == 0 and E % 16 == 0
    facts = (G, L, W, p.element_bytes, vector, kernel_device(p.device))
    backward = pick("query_attention_backward.backward_tile", *facts)
    works = attention.attention_backward(p, backward, vector)
    if backward.BLOCK_G < G:
        works.append(attention.attention_keys(p, pick("query_attention_keys_backward.keys_tile", *facts), vector))
    forward = pick("query_attention.forward_tile", *facts)
    return {"forward": [attention.attention_forward(p, forward, vector)], "backward": works}


def _norm(p: Problem, pick: Picker) -> Passes:
    forward = pick("dropout_add_layer_norm.forward_tile", p["E"])
    backward = pick("dropout_add_layer_norm_backward.backward_tile", p["E"])
    return {"forward": [rows.norm_forward(p, forward)], "backward": rows.norm_backward(p, backward)}


def _relu(p: Problem, pick: Picker) -> Passes:
    tile = pick("relu_dropout.flat_tile", p["N"] * p["F"], p.element_bytes)
    return {"forward": [rows.relu(p, tile, False)], "backward": [rows.relu(p, tile, True)]}


def loss_blocks(p: Problem) -> dict[tuple[int, int], int]:
    """Groups and columns of the blocks of logits, and how many blocks are so."""
    B, G, E, C, eb = p["B"], p["G"], p["E"], p["C"], p.element_bytes
    sizes = _loss_chunks.SIZES["cuda"]
    most = max(1, sizes.logit_bytes // (eb * max(B, 1)))
    found: dict[tuple[int, int], int] = {}
    for block in _loss_chunks.plan_blocks(G, E, math.ceil(C / G), C, most, sizes.weight_bytes // eb):
        shape = block.groups.stop - block.groups.start, block.columns.stop - block.columns.start
        found[shape] = found.get(shape, 0) + 1
    return found


def _loss(p: Problem, pick: Picker) -> Passes:
    """Forward is the loss alone, without gradients; under autograd the forward makes them, and backward scales them."""
    B, E, eb = p["B"], p["E"], p.element_bytes
    loss = p.dims.get("loss", "bce")
    forward: list[Work] = []
    both: list[Work] = []
    blocks = loss_blocks(p)
    for (g, n), times in blocks.items():
        tile = pick("_class_loss.loss_tile", g, n, loss)

        def product(m: int, columns: int, k: int, dram: float, g: int = g, times: int = times) -> Work:
            work = products.vendor_product(p, m, columns, k, dram, times)
            return replace(work, programs=work.programs * g)

        logits = product(B, n, E, float(eb * g * (n * E + B * E)))
        kernels = [
            rows.loss_kernel(p, tile, g, n, loss, statistics, times)
            for statistics in ((True, False) if loss == "softmax" else (False,))
        ]
        forward += [logits, kernels[0]]
        again = [logits] if loss == "softmax" and sum(blocks.values()) > 1 else []
        gradients = [product(B, E, n, float(eb * g * B * E)), product(E, n, B, float(eb * g * E * n))]
        bias = products.torch_pass("bias's gradient", 4.0 * g * n, times)
        both += [logits, *again, *kernels, *gradients, bias]
    scaling = [products.torch_pass("scale", 4.0, times=3)]
    return {"forward": forward, "backward": scaling, "both": [*both, *scaling]}


def csra_loss_chunks(p: Problem) -> list[tuple[int, int, int]]:
    """Images and classes of the chunks, and how many are so."""
    B, L, D, H, C, eb = p["B"], p["L"], p["D"], p["H"], p["C"], p.element_bytes
    machine = _csra_plan.MACHINES["cuda"]
    plan = _csra_plan.Plan(B, H * C)
    if B * L * H * C * eb > machine.scratch_bytes:
        plan = _csra_plan.plan_chunks(B, L, D, H * C, eb, B, machine)
    return list(_chunks(plan._replace(columns=max(1, plan.columns // H)), B, C))


def _csra_loss(p: Problem, pick: Picker) -> Passes:
    """Passes as of `_loss`. Logits are fp32; softmax makes the scores again unless one chunk has all of them."""
    B, D, H, C, eb = p["B"], p["D"], p["H"], p["C"], p.element_bytes
    loss = p.dims.get("loss", "bce")
    chunks = csra_loss_chunks(p)
    one = chunks == [(B, C, 1)]
    norms = [products.torch_pass("norms", float(eb * H * C * D))]
    # Several heads' classifiers of a range of classes are no rows of one matrix.
    copied = H > 1 and any(n < C for _, n, _ in chunks)
    copies = [products.torch_pass("copy of classifiers", 2.0 * eb * H * C * D)] if copied else []
    forward: list[Work] = [*norms, *copies]
    gradients: list[Work] = [*copies]
    for b, n, times in chunks:
        product, pooled = _pooled(p, pick, b, H * n, times, False)
        logits = [products.torch_pass("logits", 4.0 * (H + 1) * b * n, times)] if H > 1 else []
        tile = pick("_class_loss.loss_tile", 1, n, loss)
        block = replace(p, dims={**p.dims, "B": b}, element_bytes=4)
        gradient = rows.loss_kernel(block, tile, 1, n, loss, False, times)
        statistics = rows.loss_kernel(block, tile, 1, n, loss, True, times)
        forward += [product, pooled, *logits, statistics if loss == "softmax" else gradient]
        again = [*([] if one else [product]), pooled, *logits, gradient] if loss == "softmax" else []
        backward = _pooled(p, pick, b, H * n, times, True)[1]
        ranges = any(columns < C for _, columns, _ in chunks), any(images < B for images, _, _ in chunks)
        gradients += [*again, backward, *_csra_gradients(p, b, H * n, times, *ranges)]
    gradients.append(products.torch_pass("norms' gradient", 3.0 * eb * H * C * D))
    scaling = [products.torch_pass("scale", 4.0, times=3)]
    second = [*norms, *copies] if loss == "softmax" else []
    return {"forward": forward, "backward": scaling, "both": [*forward, *second, *gradients, *scaling]}


_PASSES: dict[str, Callable[[Problem, Picker], Passes]] = {
    "group_fc": _group_fc,
    "csra_pool": _csra,
    "query_attention": _attention,
    "dropout_add_layer_norm": _norm,
    "relu_dropout": _relu,
    "group_fc_loss": _loss,
    "csra_loss": _csra_loss,
}


def passes(op: str, p: Problem, pick: Picker | None = None) -> Passes:
    """The launches of forward, backward and both of an op."""
    found = _PASSES[op](p, pick or Picker())
    return {"both": found["forward"] + found["backward"], **found}
