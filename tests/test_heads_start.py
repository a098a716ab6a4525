"""How heads begin and begin anew: groups, queries, initialisation, priors, other classes, factories, state dicts."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from head_makers import MAKERS, SMALL, C, D, E, every_head
from torch import nn

from mlhead.heads import HEADS, CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder


def test_group_counts() -> None:
    """min(100, C) by default; more than C means C; J by integer arithmetic, where the public formula fails."""
    assert MLDecoder(D, 2000, **SMALL).groups == 100
    assert MLDecoder(D, 20, **SMALL).groups == 20
    assert MLDecoder(D, C, groups=50, **SMALL).groups == C
    head = MLDecoder(D, 2001, groups=2000, **SMALL)
    assert head.duplicate_pooling.shape == (2000, E, 2)
    assert head(torch.randn(2, 4, D)).shape == (2, 2001)
    assert MLDecoder(D, C, queries=torch.randn(4, E), **SMALL).groups == 4
    for options, message in (
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"queries": torch.randn(8, E)}, r"queries must be at most num_classes = 7 rows"),
        ({"queries": torch.randn(3, E + 1)}, r"queries must be \(G, E\) = \(3, 16\), got \(3, 17\)"),
        ({"queries": "words"}, "queries must be 'fixed', 'learnable' or a tensor"),
        ({"group_init": "zero"}, "group_init must be one of 'xavier3d', 'per_class', got 'zero'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            MLDecoder(D, C, **SMALL, **options)
    for queries in ([[1.0] * E], 3, None, np.ones((3, E))):
        with pytest.raises(TypeError, match="queries must be 'fixed', 'learnable' or a tensor"):
            MLDecoder(D, C, queries=queries, **SMALL)
    with pytest.raises(ValueError, match="num_heads must be a divisor of embed_dim = 16, got 3"):
        MLDecoder(D, C, embed_dim=16, num_heads=3)


def test_queries_fixed_learnable_given() -> None:
    """All are in the state dict; only learnable ones train."""
    given = torch.randn(3, E)
    for queries, trains in (("fixed", False), ("learnable", True), (given, False)):
        head = MLDecoder(D, C, groups=3, queries=queries, **SMALL)
        assert head.query_embed.weight.requires_grad is trains
        assert "query_embed.weight" in head.state_dict()
        before = head.query_embed.weight.clone()
        parameters = [p for p in head.parameters() if p.requires_grad]
        head(torch.randn(2, 4, D)).square().sum().backward()
        torch.optim.AdamW(parameters, lr=0.1).step()
        assert torch.equal(head.query_embed.weight, before) is not trains
    assert torch.equal(before, given)
    head.reset_parameters()
    assert torch.equal(head.query_embed.weight, given)
    assert 0.8 < MLDecoder(D, 100, **SMALL).query_embed.weight.std() < 1.2


def test_group_weight_initialisation() -> None:
    """The published one shrinks with the class count; "per_class" does not."""
    for num_classes, groups in ((80, 80), (20_000, 100)):
        J = num_classes // groups
        head = MLDecoder(D, num_classes, groups=groups, embed_dim=768, feedforward_dim=8)
        expected = math.sqrt(2 / (J * (768 + groups)))
        assert head.duplicate_pooling.std().item() == pytest.approx(expected, rel=0.03)
        head = MLDecoder(D, num_classes, groups=groups, embed_dim=768, feedforward_dim=8, group_init="per_class")
        assert head.duplicate_pooling.abs().max().item() <= 1 / math.sqrt(768)
        assert head.duplicate_pooling.std().item() == pytest.approx(1 / math.sqrt(3 * 768), rel=0.03)


def test_layer_initialisation_is_torchs() -> None:
    """Bounds of the uniform distributions, zero biases of the attention, unit norms."""
    head = MLDecoder(D, C, embed_dim=64, feedforward_dim=128)
    layer = head.layers[0]
    bound = math.sqrt(6 / (64 + 3 * 64))
    assert 0.9 * bound < layer.multihead_attn.in_proj_weight.abs().max() <= bound
    for name, fan_in in (("linear1", 64), ("linear2", 128)):
        weight = getattr(layer, name).weight
        assert 0.9 / math.sqrt(fan_in) < weight.abs().max() <= 1 / math.sqrt(fan_in)
    assert not layer.multihead_attn.in_proj_bias.any()
    assert not layer.multihead_attn.out_proj.bias.any()
    assert (layer.norm1.weight == 1).all()
    assert layer.norm1.eps == 1e-5


@every_head
def test_prior(make: Callable[..., Head]) -> None:
    """With features of no influence every class has its prior probability; per class too."""
    if make is MAKERS["csra-plain"]:
        with pytest.raises(ValueError, match="CSRAHead: bias must be True for a prior"):
            make(prior=0.01)
        return
    head = make(prior=0.01).eval()
    x = torch.zeros(2, 3, D)
    if not isinstance(head, (GAPHead, CSRAHead)):
        nn.init.zeros_(head.duplicate_pooling)
    torch.testing.assert_close(head(x).sigmoid(), torch.full((2, C), 0.01))
    shares = torch.linspace(0, 0.9, C)
    head.set_prior(shares)
    torch.testing.assert_close(head(x)[0].sigmoid(), shares.clamp(min=1e-6))
    for value in (1, 0.0, torch.tensor(True)):
        head.set_prior(value)
        torch.testing.assert_close(head(x).sigmoid(), torch.full((2, C), min(max(float(value), 1e-6), 1 - 1e-6)))
    before = head(x)
    for wrong in (-0.1, 1.5, math.nan, math.inf, shares + 0.2, shares - 0.01, shares.log() / shares.log()):
        with pytest.raises(ValueError, match=rf"{type(head).__name__}: prior must be in \[0, 1\] and not NaN, got"):
            head.set_prior(wrong)
    assert torch.equal(head(x), before)
    with pytest.raises(ValueError, match="prior must be"):
        make(prior=1.0)
    with pytest.raises(TypeError, match="GAPHead: prior must be a number, got str"):
        GAPHead(D, C, prior="0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"GAPHead: prior must be a number or a tensor \(C,\), got str"):
        GAPHead(D, C).set_prior("0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prior must be \(C,\) = \(7,\), got \(6,\)"):
        head.set_prior(shares[1:])


@every_head
@pytest.mark.parametrize("num_classes", [1, 5, C, 130])
def test_reset(make: Callable[..., Head], num_classes: int) -> None:
    """New last layer of the same dtype and mode; everything before it is kept."""
    head = make(dtype=torch.float64).eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    pre_logits = head(x, pre_logits=True) if not isinstance(head, (MLDecoder, TransformerDecoder)) else None
    kept = {n: p for n, p in head.named_parameters() if "layers" in n or "embed_standart" in n}
    head.reset(num_classes)
    assert head.num_classes == num_classes
    assert head(x).shape == (2, num_classes)
    assert head(x).dtype == torch.float64
    assert not head.training
    assert all(not module.training for module in head.modules())
    assert all(dict(head.named_parameters())[n] is p for n, p in kept.items())
    if pre_logits is not None:
        torch.testing.assert_close(head(x, pre_logits=True), pre_logits)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        head.reset(0)


def test_reset_and_groups() -> None:
    """Full decoding stays full, a number stays a number, queries stay while their number does."""
    full = MLDecoder(D, C, groups=C, **SMALL)
    full.reset(11)
    assert (full.groups, full.num_classes) == (11, 11)
    grouped = MLDecoder(D, C, groups=3, queries="learnable", **SMALL)
    queries = grouped.query_embed.weight
    grouped.reset(20)
    assert grouped.groups == 3
    assert grouped.query_embed.weight is queries
    grouped.reset(20, groups=5)
    assert grouped.query_embed.weight.shape == (5, E)
    assert grouped.query_embed.weight.requires_grad
    grouped.reset(2)
    assert grouped.groups == 2
    grouped.reset(20)
    assert grouped.groups == 5, "what was asked for is remembered"
    default = MLDecoder(D, C, **SMALL)
    default.reset(300)
    assert default.groups == 100
    given = MLDecoder(D, C, queries=torch.randn(3, E), **SMALL)
    given.reset(9)
    assert given.groups == 3
    with pytest.raises(ValueError, match="queries must be given anew for 2 groups"):
        given.reset(2)
    assert (given.groups, given.num_classes) == (3, 9)
    given.reset(2, queries=torch.zeros(2, E))
    assert not given.query_embed.weight.any()
    words = TransformerDecoder(D, C, queries=torch.randn(C, E), **SMALL)
    with pytest.raises(ValueError, match="queries must be given anew for 9 groups"):
        words.reset(9)
    words.reset(9, queries="fixed")
    assert not words.query_embed.weight.requires_grad


@every_head
def test_factory_arguments(make: Callable[..., Head]) -> None:
    """Every parameter has the asked device and dtype, after reset too; a meta head can be materialised."""
    head = make(device="meta", dtype=torch.bfloat16)
    for _ in range(2):
        assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}
        head.reset(9)
    real = make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.fill_(math.nan)
    real.reset_parameters()
    for name, parameter in real.named_parameters():
        assert parameter.isfinite().all(), name


@every_head
def test_state_round_trip(make: Callable[..., Head]) -> None:
    """A strict load into a fresh head, and a copy, give the same logits."""
    head, other = make().eval(), make().eval()
    x = torch.randn(2, 5, D)
    assert not torch.allclose(head(x), other(x))
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(head(x), other(x))
    assert torch.equal(copy.deepcopy(head)(x), head(x))


@every_head
def test_meta_device(make: Callable[..., Head]) -> None:
    """Shapes can be had without memory."""
    head = make(device="meta")
    assert head(torch.empty(2, D, 2, 4, device="meta")).shape == (2, C)


def test_constructor_checks() -> None:
    """Sizes and names."""
    for cls in HEADS.values():
        with pytest.raises(ValueError, match=rf"{cls.__name__}: num_classes must be at least 1, got 0"):
            cls(D, 0)
        with pytest.raises(TypeError, match=rf"{cls.__name__}: in_features must be an integer, got float"):
            cls(1.5, C)
    with pytest.raises(ValueError, match=r"CSRAHead: lam must be a number or 2 numbers"):
        CSRAHead(D, C, num_heads=2, lam=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"GAPHead: dropout must be in \[0, 1\)"):
        GAPHead(D, C, dropout=-0.1)
