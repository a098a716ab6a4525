"""The heads: against literal transcriptions, every feature layout, precision, attention maps, masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from head_makers import SMALL, C, D, E, every_decoder, every_head, fp64
from torch import Tensor, nn

from mlhead.heads import CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder


class LiteralMLDecoder(nn.Module):
    """The published formulation, expanded queries and torch's attention, loaded with a head's parameters."""

    def __init__(self, head: MLDecoder | TransformerDecoder) -> None:
        super().__init__()
        self.head, self.layer = head, head.layers[0]
        attention = self.layer.multihead_attn
        self.attention = nn.MultiheadAttention(attention.embed_dim, attention.num_heads).double()
        self.attention.load_state_dict(attention.state_dict())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, queries (G, B, E) first as in the published code."""
        head, layer = self.head, self.layer
        memory = F.relu(F.linear(tokens, head.embed_standart.weight, head.embed_standart.bias)).transpose(0, 1)
        q = head.query_embed.weight.unsqueeze(1).expand(-1, tokens.shape[0], -1)
        t = layer.norm1(q + q)
        t = layer.norm2(t + self.attention(t, memory, memory)[0])
        t = layer.norm3(t + layer.linear2(F.relu(layer.linear1(t)))).transpose(0, 1)
        groups = [t[:, g] @ head.duplicate_pooling[g] for g in range(head.groups)]
        return torch.stack(groups, 1).flatten(1)[:, : head.num_classes] + head.duplicate_pooling_bias


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 7, None])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_ml_decoder_is_the_published_formulation(groups: int | None, training: bool) -> None:
    """Values and the gradient of every parameter, fp64; 7 classes in 4 groups leave the last column empty."""
    head = fp64(MLDecoder(D, C, groups=groups, dropout=0.0 if training else 0.1, queries="learnable", **SMALL))
    head.train(training)
    literal = LiteralMLDecoder(head).train(training)
    x = torch.randn(3, 5, D, dtype=torch.float64)
    upstream = torch.randn(3, C, dtype=torch.float64)
    logits, expected = head(x), literal(x)
    torch.testing.assert_close(logits, expected)

    own = dict(head.named_parameters())
    grads = dict(zip(own, torch.autograd.grad(logits, list(own.values()), upstream), strict=True))
    theirs = {**{n: p for n, p in own.items() if "multihead_attn" not in n}}
    theirs.update({f"layers.0.multihead_attn.{n}": p for n, p in literal.attention.named_parameters()})
    for name, grad in zip(theirs, torch.autograd.grad(expected, list(theirs.values()), upstream), strict=True):
        torch.testing.assert_close(grads[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_transformer_decoder_is_torchs_layer(training: bool) -> None:
    """The layer takes the state dict of torch's TransformerDecoderLayer as it is, and gives its output."""
    head = fp64(TransformerDecoder(D, C, dropout=0.0, **SMALL)).train(training)
    theirs = nn.TransformerDecoderLayer(E, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64).train(training)
    theirs.load_state_dict(head.layers[0].state_dict())
    x = torch.randn(3, 5, D, dtype=torch.float64)
    t = theirs(head.query_embed.weight.expand(3, C, E), F.relu(head.embed_standart(x)))
    torch.testing.assert_close(head(x, pre_logits=True), t)
    expected = (t * head.duplicate_pooling.squeeze(2)).sum(2) + head.duplicate_pooling_bias
    torch.testing.assert_close(head(x), expected)


@every_decoder
def test_dropout_is_active_in_training_only(make: Callable[..., Head]) -> None:
    """Equal images get different logits in training, through each place of dropout, and equal ones in evaluation."""
    x = torch.randn(1, 5, D).expand(2, 5, D)
    head = make(dropout=0.3)
    first, second = head(x)
    assert not torch.allclose(first, second)
    first, second = head.eval()(x)
    torch.testing.assert_close(first, second)


def test_state_dict_has_the_public_keys() -> None:
    """The keys of op checkpoints, less the prefix `decoder.` of their first form."""
    head = MLDecoder(D, 11, groups=3, **SMALL)
    layer = "layers.0."
    expected = {
        **{f"{layer}norm{i}.{p}": (E,) for i in (1, 2, 3) for p in ("weight", "bias")},
        f"{layer}linear1.weight": (24, E),
        f"{layer}linear1.bias": (24,),
        f"{layer}linear2.weight": (E, 24),
        f"{layer}linear2.bias": (E,),
        f"{layer}multihead_attn.in_proj_weight": (3 * E, E),
        f"{layer}multihead_attn.in_proj_bias": (3 * E,),
        f"{layer}multihead_attn.out_proj.weight": (E, E),
        f"{layer}multihead_attn.out_proj.bias": (E,),
        "embed_standart.weight": (E, D),
        "embed_standart.bias": (E,),
        "query_embed.weight": (3, E),
        "duplicate_pooling": (3, E, 4),
        "duplicate_pooling_bias": (11,),
    }
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == expected
    assert {k for k, _ in CSRAHead(D, C, num_heads=2, bias=True).named_parameters()} == {"weight", "bias"}
    assert set(GAPHead(D, C).state_dict()) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(("normalize", "temperatures"), [(True, (1.0, math.inf)), (False, (2.0, 3.0, 99.0))])
def test_csra_head_is_the_papers_formulation(normalize: bool, temperatures: tuple[float, ...]) -> None:
    """Convolution, softmax and sum, per head."""
    head = fp64(CSRAHead(D, C, temperatures=temperatures, lam=0.2, normalize=normalize, bias=True))
    x = torch.randn(3, D, 2, 4, dtype=torch.float64)
    expected = torch.zeros(3, C, dtype=torch.float64)
    for weight, bias, T in zip(head.weight, head.bias, temperatures, strict=True):
        weight = weight / weight.norm(dim=1, keepdim=True) if normalize else weight
        score = F.conv2d(x, weight[:, :, None, None], bias).flatten(2)
        attended = score.amax(2) if math.isinf(T) else (score * F.softmax(T * score, 2)).sum(2)
        expected = expected + score.mean(2) + 0.2 * attended
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_csra_from_a_trained_classifier(conv: bool) -> None:
    """Fig. 1 of the paper: y_avg + lam * y_max of the classifier's scores."""
    linear = nn.Conv2d(D, C, 1) if conv else nn.Linear(D, C)
    head = CSRAHead.from_linear(linear, lam=0.2)
    x = torch.randn(3, D, 2, 4)
    scores = F.conv2d(x, linear.weight.reshape(C, D, 1, 1), linear.bias).flatten(2)
    torch.testing.assert_close(head(x), scores.mean(2) + 0.2 * scores.amax(2))
    with torch.no_grad():
        head.weight.zero_()
    assert linear.weight.abs().sum() > 0, "the classifier's parameters are copied"


def test_csra_default_temperatures() -> None:
    """By the number of heads, as in the paper; any other number needs them given."""
    assert CSRAHead(D, C).temperatures == (1.0,)
    assert CSRAHead(D, C, num_heads=6).temperatures == (1, 2, 3, 4, 5, math.inf)
    assert CSRAHead(D, C, temperatures=(1, 5, 9)).num_heads == 3
    with pytest.raises(ValueError, match=r"CSRAHead: temperatures must be given for 3 heads"):
        CSRAHead(D, C, num_heads=3)
    with pytest.raises(ValueError, match="temperatures must be of length num_heads = 2"):
        CSRAHead(D, C, num_heads=2, temperatures=(1,))
    with pytest.raises(ValueError, match="temperatures must be at least one number, all above 0"):
        CSRAHead(D, C, temperatures=(0.0,))


def test_gap_head_is_mean_and_linear() -> None:
    """And its pre-logits are the pooled features."""
    head, x = GAPHead(D, C), torch.randn(3, D, 2, 4)
    torch.testing.assert_close(head(x), F.linear(x.mean((2, 3)), head.fc.weight, head.fc.bias))
    torch.testing.assert_close(head(x, pre_logits=True), x.mean((2, 3)))


@every_head
def test_layouts_agree(make: Callable[..., Head]) -> None:
    """Contiguous and channels-last maps, tokens, and strided tokens give the same logits, and are not written."""
    head = make().eval()
    x = torch.randn(3, D, 2, 4)
    before = x.clone()
    tokens = x.flatten(2).transpose(1, 2)
    expected = head(x)
    assert expected.shape == (3, C)
    padded = F.pad(tokens, (1, 2, 1, 0))[:, 1:, 1:-2]
    for features in (x.contiguous(memory_format=torch.channels_last), tokens, tokens.contiguous(), padded):
        torch.testing.assert_close(head(features), expected)
    assert torch.equal(x, before)


@every_head
def test_empty_batch(make: Callable[..., Head]) -> None:
    """(0, C) logits and zero gradients, in training too."""
    head = make()
    logits = head(torch.empty(0, D, 2, 4))
    assert logits.shape == (0, C)
    logits.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert head.attention_maps(torch.empty(0, D, 2, 4), [1, 2]).shape == (0, 2, 8)


@every_head
def test_features_are_checked(make: Callable[..., Head]) -> None:
    """Rank, width, no positions, dtype; each message names the head and what it wants."""
    head = make()
    name = type(head).__name__
    with pytest.raises(ValueError, match=rf"{name}: features must be maps \(B, 12, H, W\) or tokens .*got \(2, 12\)"):
        head(torch.randn(2, D))
    for wrong in (torch.randn(2, 5, D + 1), torch.randn(2, D + 1, 2, 2), torch.randn(2, D, 5)):
        with pytest.raises(ValueError, match=rf"{name}: features must be maps"):
            head(wrong)
    for empty in (torch.randn(2, 0, D), torch.randn(2, D, 0, 3)):
        with pytest.raises(ValueError, match=rf"{name}: features must be of at least one position \(L > 0\)"):
            head(empty)
    with pytest.raises(TypeError, match=rf"{name}: features must be torch.float32 like the head's parameters"):
        head(torch.randn(2, 5, D, dtype=torch.float64))
    with pytest.raises(TypeError, match="features must be of a floating dtype"):
        head(torch.ones(2, 5, D, dtype=torch.long))
    with pytest.raises(TypeError, match=r"features must be a torch.Tensor, got list"):
        head([torch.randn(2, 5, D)])


@every_head
def test_every_parameter_that_trains_gets_a_gradient(make: Callable[..., Head]) -> None:
    """And an optimiser step lowers a loss."""
    head = make()
    x, y = torch.randn(4, D, 2, 4), torch.rand(4, C)
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=0.01)
    before = F.binary_cross_entropy_with_logits(head.eval()(x), y)
    F.binary_cross_entropy_with_logits(head(x), y).backward()
    # A bias of the keys shifts all scores of a query alike: its gradient is 0 but for rounding.
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    optimizer.step()
    assert F.binary_cross_entropy_with_logits(head(x), y) < before


@every_head
def test_gradcheck(make: Callable[..., Head]) -> None:
    """The features' gradient in fp64, against finite differences."""
    head = fp64(make()).eval()
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (x,))


@every_head
def test_autocast_and_low_precision(make: Callable[..., Head]) -> None:
    """fp32 parameters under bf16 autocast, and a bf16 head, stay near fp32, and the gradients are finite."""
    head = make().eval()
    x = torch.randn(4, D, 2, 4)
    exact = head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(x)
        from_bf16 = head(x.bfloat16())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(from_bf16.float(), exact, rtol=0.05, atol=0.05)
    mixed.float().sum().backward()
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
    low = copy.deepcopy(head).bfloat16()
    logits = low(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)


@every_head
def test_attention_maps(make: Callable[..., Head]) -> None:
    """(B, K, L), not negative, of sum 1 (or 0 for GAP); classes per image give what classes for all give."""
    head = fp64(make()).eval()
    x = torch.randn(3, D, 2, 4, dtype=torch.float64)
    classes = torch.tensor([6, 0, 0, 3])
    maps = head.attention_maps(x, classes)
    assert maps.shape == (3, 4, 8)
    assert (maps >= 0).all()
    sums = maps.sum(2).double()
    assert (((sums - 1).abs() < 1e-5) | (sums == 0)).all()
    assert isinstance(head, GAPHead) or (sums > 0).all()
    torch.testing.assert_close(maps[:, 1], maps[:, 2])
    torch.testing.assert_close(head.attention_maps(x, [6, 0, 0, 3]), maps)
    own = torch.tensor([[1, 2], [3, 4], [5, 6]])
    each = head.attention_maps(x, own)
    for image, chosen in enumerate(own):
        torch.testing.assert_close(each[image], head.attention_maps(x, chosen)[image])
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(head.attention_maps(tokens, classes), maps)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 7\), got 0 to 7"):
        head.attention_maps(x, [0, 7])
    with pytest.raises(ValueError, match=r"classes must be \(K,\) or \(B, K\) with B = 3"):
        head.attention_maps(x, torch.zeros(2, 2, dtype=torch.long))
    for wrong in ([0.5], torch.empty(0)):
        with pytest.raises(TypeError, match=r"classes must be integers, got torch.float32"):
            head.attention_maps(x, wrong)
    for nothing in ([], (), torch.empty(0, dtype=torch.int64), [[], [], []]):
        assert head.attention_maps(x, nothing).shape == (3, 0, 8)


def test_attention_maps_are_what_they_say() -> None:
    """GAP against its class activation map, MLDecoder against torch's attention weights."""
    x = torch.randn(3, 5, D, dtype=torch.float64)
    gap = fp64(GAPHead(D, C))
    scores = torch.einsum("bld,kd->bkl", x, gap.fc.weight[[2, 4]]).relu()
    expected = scores / scores.sum(2, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(gap.attention_maps(x, [2, 4]).double(), expected, rtol=1e-5, atol=1e-6)

    head = fp64(MLDecoder(D, C, groups=3, **SMALL))  # in training: the maps are without dropout all the same
    literal = LiteralMLDecoder(head)
    memory = F.relu(head.embed_standart(x)).transpose(0, 1)
    t = head.layers[0].norm1(2 * head.query_embed.weight).unsqueeze(1).expand(-1, 3, -1)
    _, weights = literal.attention(t, memory, memory)
    torch.testing.assert_close(head.attention_maps(x, [0, 2, 3, 6]), weights[:, [0, 0, 1, 2]])
    assert head.training


@every_decoder
def test_key_mask(make: Callable[..., Head]) -> None:
    """Masked positions have no influence and no attention."""
    head = make().eval()
    x = torch.randn(2, 6, D)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    logits = head(x, key_mask=mask)
    torch.testing.assert_close(logits[:1], head(x[:1]))
    torch.testing.assert_close(logits[1:], head(x[1:, :4]))
    maps = head.attention_maps(x, [0, 1], key_mask=mask)
    assert not maps[1, :, 4:].any()


def test_pre_logits() -> None:
    """The decoders' are the decoded queries, from which group_fc makes the logits."""
    head = MLDecoder(D, C, groups=3, **SMALL).eval()
    x = torch.randn(2, 5, D)
    h = head(x, pre_logits=True)
    assert h.shape == (2, 3, E)
    logits = torch.einsum("bge,gej->bgj", h, head.duplicate_pooling).flatten(1)[:, :C] + head.duplicate_pooling_bias
    torch.testing.assert_close(head(x), logits)
    csra, maps = CSRAHead(D, C), torch.randn(2, D, 3, 3)
    torch.testing.assert_close(csra(maps, pre_logits=True), maps.mean((2, 3)))


@every_head
def test_repr(make: Callable[..., Head]) -> None:
    """What is printed says what it is."""
    head = make()
    assert "in_features=12, num_classes=7" in repr(head)
    assert repr(head).startswith(type(head).__name__)
