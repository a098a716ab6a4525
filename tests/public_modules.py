"""The public modules of both papers in torch's own parts and under the public names, and small heads of ours."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlhead import (
    MLDecoder,
    ZeroShotMLDecoder,
    load_public,
)
from mlhead.checkpoints import CheckpointError

D, E, H, WIDTH = 12, 16, 4, 24


class Box(nn.Module):
    """A module for the names of its children only."""


class PublicDecoder(nn.Module):
    """The head of the paper in torch's own modules, under the public names: expanded queries, group by group."""

    def __init__(self, C, G, J=None, form="decoder", self_attention=False, E=E):
        super().__init__()
        self.C, self.G = C, G
        layer = Box()
        if self_attention:
            layer.self_attn = nn.MultiheadAttention(E, H)
        layer.multihead_attn = nn.MultiheadAttention(E, H)
        layer.linear1, layer.linear2 = nn.Linear(E, WIDTH), nn.Linear(WIDTH, E)
        layer.norm1, layer.norm2, layer.norm3 = nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E)
        self.decoder = Box()
        self.decoder.layers = nn.ModuleList([layer])
        outer = self.decoder if form == "decoder" else self
        outer.embed_standart = nn.Linear(D, E)
        outer.query_embed = nn.Embedding(G, E)
        outer.duplicate_pooling = nn.Parameter(torch.randn(G, E, -(-C // G) if J is None else J))
        outer.duplicate_pooling_bias = nn.Parameter(torch.randn(C))
        self.outer = [outer]  # in a list, so that it is not registered twice
        for parameter in self.parameters():  # norms and biases would start at values that hide a mistake
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        outer = self.outer[0]
        memory = F.relu(outer.embed_standart(x.flatten(2).transpose(1, 2))).transpose(0, 1)
        t = self.decoded(outer.query_embed.weight[:, None].expand(-1, x.shape[0], -1), memory)
        logits = torch.cat([t[g] @ outer.duplicate_pooling[g] for g in range(self.G)], 1)
        return logits[:, : self.C] + outer.duplicate_pooling_bias

    def decoded(self, q, memory):
        layer = self.decoder.layers[0]
        residual = layer.self_attn(q, q, q)[0] if hasattr(layer, "self_attn") else q
        t = layer.norm1(q + residual)
        t = layer.norm2(t + layer.multihead_attn(t, memory, memory)[0])
        return layer.norm3(t + layer.linear2(F.relu(layer.linear1(t))))


class PublicZeroShot(PublicDecoder):
    """The same with word vectors as queries, which are a plain attribute, and one pooling vector for all of them."""

    def __init__(self, E, W, form="decoder", projected=True):
        super().__init__(1, 1, form=form, E=E)
        outer = self.outer[0]
        del outer.query_embed
        self.wordvec_proj = nn.Linear(W, E) if projected else nn.Identity()
        outer.duplicate_pooling = nn.Parameter(torch.randn(E, 1))
        outer.duplicate_pooling_bias = nn.Parameter(torch.randn(1))

    def forward(self, x, words):
        outer = self.outer[0]
        memory = F.relu(outer.embed_standart(x.flatten(2).transpose(1, 2))).transpose(0, 1)
        q = F.relu(self.wordvec_proj(words))[:, None].expand(-1, x.shape[0], -1)
        t = self.decoded(q, memory)
        return (t @ outer.duplicate_pooling)[..., 0].t() + outer.duplicate_pooling_bias


class PublicCSRA(nn.Module):
    """One normalised 1x1 classifier for each temperature, under the public names."""

    def __init__(self, C, temperatures, lam):
        super().__init__()
        self.temperatures, self.lam = temperatures, lam
        self.classifier = Box()
        self.classifier.multi_head = nn.ModuleList()
        for _ in temperatures:
            box = Box()
            box.head = nn.Conv2d(D, C, 1, bias=False)
            self.classifier.multi_head.append(box)

    def forward(self, x):
        logits = 0
        for T, box in zip(self.temperatures, self.classifier.multi_head, strict=True):
            weight = box.head.weight
            s = (F.conv2d(x, weight) / weight.flatten(1).norm(dim=1)[:, None, None]).flatten(2)
            attended = s.amax(-1) if T == math.inf else (s * torch.softmax(T * s, -1)).sum(-1)
            logits = logits + s.mean(-1) + self.lam * attended
        return logits


def make_decoder(C=11, G=4, **options):
    return MLDecoder(D, C, groups=G, embed_dim=E, num_heads=H, feedforward_dim=WIDTH, **options)


def make_zero_shot(E=E, W=30, C=7, **options):
    return ZeroShotMLDecoder(D, C, embed_dim=E, num_heads=H, feedforward_dim=WIDTH, word_dim=W, **options)


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def load_fails(head, source, **options):
    """The message of the failing load, which has left the head as it was."""
    before = copied(head)
    with pytest.raises(CheckpointError) as error:
        load_public(head, source, **options)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    return str(error.value)


def with_backbone(state, prefix="head."):
    return {"body.conv1.weight": torch.randn(4, 3, 3, 3), "body.bn1.bias": torch.randn(4)} | {
        prefix + key: value for key, value in state.items()
    }
