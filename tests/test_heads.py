"""The heads: against literal transcriptions, every feature layout, tracing, precision, initialisation, resetting."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlhead.heads import HEADS, CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder

D, C, E = 12, 7, 16
SMALL = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24}
MAKERS: dict[str, Callable[..., Head]] = {
    "gap": lambda **o: GAPHead(D, C, **o),
    "csra": lambda **o: CSRAHead(D, C, num_heads=2, bias=True, **o),
    "csra-plain": lambda **o: CSRAHead(D, C, normalize=False, lam=0.3, **o),
    "ml_decoder": lambda **o: MLDecoder(D, C, groups=3, **SMALL, **o),
    "ml_decoder-full": lambda **o: MLDecoder(D, C, groups=C, queries="learnable", **SMALL, **o),
    "transformer_decoder": lambda **o: TransformerDecoder(D, C, **SMALL, **o),
}
DECODERS = [name for name in MAKERS if "decoder" in name]
every_head = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_decoder = pytest.mark.parametrize("make", [MAKERS[n] for n in DECODERS], ids=DECODERS)


def fp64(head: Head) -> Head:
    """The head in fp64 with random biases, so that a bias at the wrong place shows."""
    head = head.double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return head


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
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiles_without_a_graph_break(make: Callable[..., Head], training: bool) -> None:
    """fullgraph=True, values and gradients; aot_eager, since the ops' own tests run inductor."""
    torch._dynamo.reset()
    head = make().train(training)
    for module in head.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, D, 2, 4, requires_grad=True)
    expected, logits = head(x), compiled(x)
    torch.testing.assert_close(logits, expected)
    upstream = torch.randn_like(expected)
    (a,), (b,) = torch.autograd.grad(logits, x, upstream), torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(a, b)


@every_decoder
def test_compiles_with_dropout(make: Callable[..., Head]) -> None:
    """In training with dropout there is no graph break, and calls differ."""
    torch._dynamo.reset()
    head = make(dropout=0.2)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, D)
    first, second = compiled(x), compiled(x)
    assert not torch.allclose(first, second)
    (first + second).sum().backward()
    assert head.duplicate_pooling.grad.abs().sum() > 0


@every_head
def test_exports_with_a_dynamic_batch(make: Callable[..., Head]) -> None:
    """torch.export, run at another batch size."""
    head = make().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(head, (torch.randn(4, D, 2, 4),), dynamic_shapes={"features": {0: batch}})
    x = torch.randn(6, D, 2, 4)
    torch.testing.assert_close(program.module()(x), head(x))


@every_head
def test_inductor_on_one_size(make: Callable[..., Head]) -> None:
    """The default compiler, evaluation only."""
    torch._dynamo.reset()
    head = make().eval()
    x = torch.randn(4, 8, D)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, fullgraph=True)(x), head(x), rtol=1e-5, atol=1e-5)


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


@every_head
def test_repr(make: Callable[..., Head]) -> None:
    """What is printed says what it is."""
    head = make()
    assert "in_features=12, num_classes=7" in repr(head)
    assert repr(head).startswith(type(head).__name__)


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
