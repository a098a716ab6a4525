"""Group fully-connected layer: ML-Decoder, Eq. 3, Fig. 4 and App. L."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def group_fc(h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int) -> Tensor:
    """logits[b, c] = sum_e h[b, g, e] weight[g, e, j] + bias[c] with g = c div J, j = c mod J, c < C.

    h (B, G, E), weight (G, E, J), bias (C) or None -> logits (B, C). Classes past C do not exist.
    """
    B, G, _ = h.shape
    J = weight.shape[2]
    logits = torch.einsum("bge,gej->bgj", h, weight).reshape(B, G * J)[:, :num_classes]
    return (logits if bias is None else logits + bias).contiguous()


def group_fc_topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their classes, (B, k) both; of equal ones the lower class comes first."""
    scores, classes = torch.sort(group_fc(h, weight, bias, num_classes), dim=1, descending=True, stable=True)
    return scores[:, :k].contiguous(), classes[:, :k].contiguous()


def group_fc_grad(
    dlogits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients (dh, dweight, dbias):

    dh[b, g, e] = sum_j dlogits[b, gJ + j] weight[g, e, j];  dweight[g, e, j] = sum_b h[b, g, e] dlogits[b, gJ + j];
    dbias[c] = sum_b dlogits[b, c].
    """
    B, G, _ = h.shape
    J = weight.shape[2]
    dlogits_groups = pad(dlogits, (0, G * J - num_classes)).reshape(B, G, J)
    if num_classes < G * J:
        # Past C there is no class: an infinite weight there must not make 0 * inf.
        exists = (torch.arange(G * J, device=h.device) < num_classes).view(G, 1, J)
        weight = weight.where(exists, 0.0)
    dh = torch.einsum("bgj,gej->bge", dlogits_groups, weight)
    dweight = torch.einsum("bge,bgj->gej", h, dlogits_groups)
    if num_classes < G * J:
        dweight = dweight.where(exists, 0.0)
    return dh, dweight, None if bias is None else dlogits.sum(0)
