"""What mlhead is measured against: the papers' formulations, the best plain torch, and torch.compile of both.

Every baseline takes the tensors and options of an op's sample. Those named "papers: ..." follow the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlhead import SparseTargets
from mlhead.testing import Sample

Baseline = Callable[..., Tensor]


def group_fc_loop(h: Tensor, weight: Tensor, bias: Tensor | None, *, num_classes: int) -> Tensor:
    """ML-Decoder, App. L: one matrix product for each group, into zeros, then the slice and the bias."""
    logits = torch.zeros(h.shape[0], h.shape[1], weight.shape[2], device=h.device, dtype=h.dtype)
    for g in range(h.shape[1]):
        logits[:, g, :] = torch.matmul(h[:, g, :], weight[g])
    out = logits.flatten(1)[:, :num_classes]
    return out if bias is None else out + bias


def group_fc_bmm(h: Tensor, weight: Tensor, bias: Tensor | None, *, num_classes: int) -> Tensor:
    """One batched product on transposed views."""
    out = torch.bmm(h.transpose(0, 1), weight).transpose(0, 1).reshape(h.shape[0], -1)[:, :num_classes]
    return out if bias is None else out + bias


def group_fc_einsum(h: Tensor, weight: Tensor, bias: Tensor | None, *, num_classes: int) -> Tensor:
    """The same as an einsum."""
    out = torch.einsum("bge,gej->bgj", h, weight).flatten(1)[:, :num_classes]
    return out if bias is None else out + bias


def _unit_rows(weight: Tensor, normalize: bool) -> Tensor:
    return weight / torch.linalg.vector_norm(weight, dim=-1, keepdim=True) if normalize else weight


def _pool(scores: Tensor, temperature: float, lam: float, average: float) -> Tensor:
    """`average` times the mean plus lam times the attention-weighted mean over the last axis."""
    if temperature == math.inf:
        attended = scores.amax(-1)
    else:
        attended = (torch.softmax(temperature * scores, -1) * scores).sum(-1)
    return average * scores.mean(-1) + lam * attended


def csra_pool_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, temperatures: Any, lam: Any, normalize: bool, average: float
) -> Tensor:
    """CSRA's published code: for each head a 1x1 convolution, softmax and sums over its score map."""
    lams = lam if isinstance(lam, tuple) else (lam,) * len(temperatures)
    image = x if x.ndim == 4 else x.transpose(1, 2).unsqueeze(-1)
    logits = []
    for head, (temperature, lam_h) in enumerate(zip(temperatures, lams, strict=True)):
        kernel = _unit_rows(weight[head], normalize)[:, :, None, None]
        scores = F.conv2d(image, kernel, None if bias is None else bias[head]).flatten(2)
        logits.append(_pool(scores, temperature, lam_h, average))
    return torch.stack(logits).sum(0)


def csra_pool_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, temperatures: Any, lam: Any, normalize: bool, average: float
) -> Tensor:
    """One matrix product for all heads."""
    lams = lam if isinstance(lam, tuple) else (lam,) * len(temperatures)
    H, C, D = weight.shape
    features = x.flatten(2) if x.ndim == 4 else x.transpose(1, 2)
    scores = torch.matmul(_unit_rows(weight, normalize).view(H * C, D), features).unflatten(1, (H, C))
    if bias is not None:
        scores = scores + bias[None, :, :, None]
    return torch.stack([_pool(scores[:, h], T, lams[h], average) for h, T in enumerate(temperatures)]).sum(0)


def _split(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, N, E / H) of queries repeated for every image, keys and values."""
    q = q if q.ndim == 3 else q.expand(k.shape[0], *q.shape)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def query_attention_mha(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, **options: Any) -> Tensor:
    """What nn.MultiheadAttention does between its projections, as published code calls it: bmm, softmax, bmm, and the
    mean of the weights over the heads, which is returned beside the output.

    Its tensors are (N, B, E); with `sequence_first` inputs none is copied to get there.
    """
    B, L, E = k.shape
    d = E // num_heads
    queries = q.unsqueeze(1).expand(-1, B, -1) if q.ndim == 2 else q.transpose(0, 1)
    G = queries.shape[0]
    qs = (queries * (1.0 / math.sqrt(d))).reshape(G, B * num_heads, d).transpose(0, 1)
    ks, vs = (t.transpose(0, 1).reshape(L, B * num_heads, d).transpose(0, 1) for t in (k, v))
    weights = torch.softmax(torch.bmm(qs, ks.transpose(1, 2)), -1)
    out = torch.bmm(weights, vs).transpose(0, 1).contiguous().view(G, B, E)
    weights.view(B, num_heads, G, L).mean(1)
    return out.transpose(0, 1)


def sequence_first(sample: Sample) -> Sample:
    """The inputs of `query_attention_mha` as its projections leave them: (L, B, E) in memory."""

    def arrange(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    tensors = {n: arrange(t) if t is not None and n in ("k", "v") else t for n, t in sample.tensors.items()}
    return replace(sample, tensors=tensors, dout=arrange(sample.dout))


def query_attention_bmm(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, **options: Any) -> Tensor:
    """Two batched products and a softmax on heads copied together."""
    qs, ks, vs = (t.reshape(-1, *t.shape[2:]) for t in _split(q, k, v, num_heads))
    weights = torch.softmax(torch.bmm(qs / math.sqrt(qs.shape[-1]), ks.transpose(1, 2)), -1)
    out = torch.bmm(weights, vs).unflatten(0, (k.shape[0], num_heads))
    return out.transpose(1, 2).flatten(2)


def query_attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, **options: Any) -> Tensor:
    """scaled_dot_product_attention by torch's own choice of its backends."""
    return F.scaled_dot_product_attention(*_split(q, k, v, num_heads)).transpose(1, 2).flatten(2)


def _sdpa_on(backend: SDPBackend) -> Baseline:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return query_attention_sdpa(q, k, v, num_heads=num_heads)

    return attention


def dropout_add_layer_norm_eager(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float, eps: float, **options: Any
) -> Tensor:
    """Three functions of torch; the masks are its own."""
    return F.layer_norm(residual + F.dropout(x, dropout_p), x.shape[-1:], weight, bias, eps)


def relu_dropout_eager(x: Tensor, *, dropout_p: float, **options: Any) -> Tensor:
    """Two functions of torch."""
    return F.dropout(F.relu(x), dropout_p)


def published_asl(logits: Tensor, y: Tensor) -> Tensor:
    """ASL as the papers' training scripts compute it, with gamma 4 and 0, margin 0.05, and the mean for the sum."""
    p = torch.sigmoid(logits.float())
    q = (1 - p + 0.05).clamp(max=1)
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
    with torch.no_grad():
        focal = torch.pow(1 - p * y - q * (1 - y), 4 * (1 - y))
    return -(loss * focal).mean()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": lambda logits, y: F.binary_cross_entropy_with_logits(logits.float(), y),
    "asl": published_asl,
    "softmax": lambda logits, y: F.cross_entropy(logits.float(), y),
}


def with_loss(logits_of: Baseline) -> Baseline:
    """A baseline of logits, then the loss of them and of dense targets."""

    def run(*, loss: str, targets: Any, **arguments: Any) -> Tensor:
        logits = logits_of(**arguments)
        y = targets.to_dense(torch.float32) if isinstance(targets, SparseTargets) else targets.float()
        return _LOSSES[loss](logits, y)

    return run


# The first of each op is the papers' formulation; `compiled` in run.py takes all that are listed here.
BASELINES: dict[str, dict[str, Baseline]] = {
    "group_fc": {"papers: loop": group_fc_loop, "torch: bmm": group_fc_bmm, "torch: einsum": group_fc_einsum},
    "csra_pool": {"papers: conv": csra_pool_conv, "torch: matmul": csra_pool_matmul},
    "query_attention": {
        "papers: mha": query_attention_mha,
        "torch: sdpa": query_attention_sdpa,
        "torch: bmm": query_attention_bmm,
    },
    "dropout_add_layer_norm": {"papers: dropout, add, norm": dropout_add_layer_norm_eager},
    "relu_dropout": {"papers: relu, dropout": relu_dropout_eager},
    "group_fc_loss": {"papers: loop, dense loss": with_loss(group_fc_loop), "torch: bmm": with_loss(group_fc_bmm)},
    "csra_loss": {"papers: conv, dense loss": with_loss(csra_pool_conv), "torch: matmul": with_loss(csra_pool_matmul)},
}

# How a baseline has its inputs in memory, where that is not as the ops have them.
ARRANGED: dict[tuple[str, str], Callable[[Sample], Sample]] = {("query_attention", "papers: mha"): sequence_first}

# Refused shapes become rows that say so.
CUDA_ONLY: dict[str, dict[str, Baseline]] = {
    "query_attention": {
        "torch: sdpa flash": _sdpa_on(SDPBackend.FLASH_ATTENTION),
        "torch: sdpa efficient": _sdpa_on(SDPBackend.EFFICIENT_ATTENTION),
        "torch: sdpa cudnn": _sdpa_on(SDPBackend.CUDNN_ATTENTION),
    }
}


def baselines(op: str, device: str, compile_modes: tuple[str, ...]) -> dict[str, Baseline]:
    """The baselines of an op by name; with `compile_modes`, also torch.compile of the first two."""
    plain = dict(BASELINES[op])
    found = {**plain, **(CUDA_ONLY.get(op, {}) if device == "cuda" else {})}
    for mode in compile_modes:
        for name in list(plain)[:2]:
            label = "compile" if mode == "default" else f"compile {mode}"
            found[f"{label}: {name.split(': ')[1]}"] = torch.compile(
                plain[name], mode=None if mode == "default" else mode, fullgraph=True, dynamic=False
            )
    return found
