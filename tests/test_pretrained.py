"""Public checkpoints: both key forms and CSRA give the logits of the public modules, whatever does not fit is told."""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlhead import (
    CSRAHead,
    GAPHead,
    MLDecoder,
    TransformerDecoder,
    ZeroShotMLDecoder,
    attach_head,
    head_from_public,
    load_public,
    public_state_dict,
)
from mlhead.checkpoints import CheckpointError
from mlhead.pretrained import LoadReport

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


def _ml_decoder(C=11, G=4, **options):
    return MLDecoder(D, C, groups=G, embed_dim=E, num_heads=H, feedforward_dim=WIDTH, **options)


def _zero_shot(E=E, W=30, C=7, **options):
    return ZeroShotMLDecoder(D, C, embed_dim=E, num_heads=H, feedforward_dim=WIDTH, word_dim=W, **options)


def _copy(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def _fails(head, source, **options):
    """The message of the failing load, which has left the head as it was."""
    before = _copy(head)
    with pytest.raises(CheckpointError) as error:
        load_public(head, source, **options)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    return str(error.value)


def _with_backbone(state, prefix="head."):
    return {"body.conv1.weight": torch.randn(4, 3, 3, 3), "body.bn1.bias": torch.randn(4)} | {
        prefix + key: value for key, value in state.items()
    }


@pytest.mark.parametrize("form", ["decoder", "flat"])
@pytest.mark.parametrize(("C", "G"), [(11, 4), (8, 8), (9, 3), (21, 20), (5, 1)])
@pytest.mark.parametrize("queries", ["fixed", "learnable"])
def test_ml_decoder_gives_the_public_logits(form, C, G, queries):
    public, head = PublicDecoder(C, G, form=form).eval(), _ml_decoder(C, G, queries=queries).eval()
    report = load_public(head, public.state_dict(), verbose=False)
    assert (report.kind, report.form, report.prefix) == ("ml_decoder", form, "")
    assert not report.casts
    assert not report.ignored
    assert len(report.mapped) == len(public.state_dict()) == len(head.state_dict())
    assert head.query_embed.weight.requires_grad == (queries == "learnable")
    x = torch.randn(3, D, 5, 2)
    torch.testing.assert_close(head(x), public(x), rtol=1e-4, atol=1e-5)


def test_transformer_decoder_gives_the_public_logits():
    public = PublicDecoder(7, 7, self_attention=True).eval()
    head = head_from_public(public.state_dict(), num_heads=H, verbose=False).eval()
    assert isinstance(head, TransformerDecoder)
    x = torch.randn(3, D, 5, 2)
    torch.testing.assert_close(head(x), public(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
def test_csra_gives_the_public_logits(heads):
    head = CSRAHead(D, 9, num_heads=heads, lam=0.3).eval()
    public = PublicCSRA(9, head.temperatures, 0.3)
    assert public.state_dict()["classifier.multi_head.0.head.weight"].shape == (9, D, 1, 1)
    built = head_from_public(public.state_dict(), lam=0.3, verbose=False)
    load_public(head, public.state_dict(), verbose=False)
    x = torch.randn(3, D, 5, 2)
    for each in (head, built):
        torch.testing.assert_close(each(x), public(x), rtol=1e-4, atol=1e-5)


def test_openmmlab_and_own_names_of_csra():
    head = CSRAHead(D, 9, num_heads=2)
    state = {f"head.csra_heads.{i}.head.weight": torch.randn(9, D, 1, 1) for i in range(2)}
    report = load_public(head, state | {"backbone.conv1.weight": torch.zeros(1)}, verbose=False)
    assert (report.form, report.prefix, report.ignored) == ("csra_heads", "head.", {"backbone": 1})
    assert torch.equal(head.weight[1], state["head.csra_heads.1.head.weight"][:, :, 0, 0])
    other = CSRAHead(D, 9, num_heads=2)
    assert load_public(other, head.state_dict(), verbose=False).form == "own"
    assert torch.equal(other.weight, head.weight)


@pytest.mark.parametrize("form", ["decoder", "flat"])
@pytest.mark.parametrize("prefix", ["", "head.", "module.model.head"])
@pytest.mark.parametrize("make", [_ml_decoder, lambda: TransformerDecoder(D, 7, embed_dim=E, num_heads=H)])
def test_round_trip_of_decoders_is_the_identity(form, prefix, make):
    head, fresh = make().eval(), make().eval()
    state = public_state_dict(head, form, prefix)
    dotted = prefix + "." if prefix and not prefix.endswith(".") else prefix
    assert f"{dotted}decoder.layers.0.norm1.weight" in state
    assert f"{dotted}{'decoder.' if form == 'decoder' else ''}query_embed.weight" in state
    load_public(fresh, state, verbose=False)
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in fresh.state_dict().items())
    again = public_state_dict(fresh, form, prefix)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    x = torch.randn(2, D, 3, 3)
    assert torch.equal(fresh(x), head(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["decoder", "flat"])
def test_round_trip_of_csra_is_the_identity(bias, form):
    head, fresh = (CSRAHead(D, 9, num_heads=4, bias=bias) for _ in range(2))
    if bias:
        nn.init.normal_(head.bias)
    state = public_state_dict(head, form, "module.")
    assert state["module.classifier.multi_head.3.head.weight"].shape == (9, D, 1, 1)
    report = load_public(fresh, state, verbose=False)
    assert (report.prefix, report.form, len(report.mapped)) == ("module.", "multi_head", 8 if bias else 4)
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in fresh.state_dict().items())
    x = torch.randn(2, D, 3, 3)
    assert torch.equal(fresh(x), head(x))


def test_the_public_module_takes_the_public_state_dict():
    head = _ml_decoder()
    public = PublicDecoder(11, 4, form="flat")
    assert not any(public.load_state_dict(public_state_dict(head, "flat")))
    csra = PublicCSRA(9, (1.0, math.inf), 0.1)
    assert not any(csra.load_state_dict(public_state_dict(CSRAHead(D, 9, num_heads=2))))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"a": {"model": s}}])
@pytest.mark.parametrize("prefix", ["", "head.", "module.head.", "module.model.head.", "_orig_mod.classifier.decoder."])
def test_containers_and_prefixes_are_found(wrap, prefix):
    public = PublicDecoder(11, 4)
    head = _ml_decoder()
    report = load_public(head, wrap(OrderedDict(_with_backbone(public.state_dict(), prefix))), verbose=False)
    assert report.prefix.endswith(prefix)
    assert report.ignored == {"body": 2}
    assert torch.equal(head.query_embed.weight, public.decoder.query_embed.weight)


def test_backbone_keys_are_counted_below_what_holds_the_model():
    state = _with_backbone(PublicDecoder(11, 4).state_dict())
    wrapped = {"module." + key: value for key, value in state.items()} | {"loss.scale": torch.ones(1)}
    assert load_public(_ml_decoder(), wrapped, verbose=False).ignored == {"body": 2, "loss": 1}


def test_a_backbone_with_layers_and_a_detr_beside_the_head():
    state = PublicDecoder(11, 4, form="flat").state_dict() | {
        "layers.0.blocks.0.norm1.weight": torch.ones(3),
        "detr.decoder.layers.0.multihead_attn.in_proj_weight": torch.ones(3),
        "detr.query_embed.weight": torch.ones(3),
    }
    report = load_public(_ml_decoder(), state, verbose=False)
    assert report.ignored == {"detr": 2, "layers": 1}


def test_several_heads_need_a_prefix():
    one, two = PublicDecoder(11, 4), PublicDecoder(11, 4)
    source = {"model": _with_backbone(one.state_dict()), "ema": _with_backbone(two.state_dict())}
    message = _fails(_ml_decoder(), source)
    assert "prefix one of those below" in message
    assert "'model.head.': an ML-Decoder checkpoint of 11 classes, G = 4" in message
    for prefix in ("ema.head.", "ema.head", "ema.head.decoder"):
        head = _ml_decoder()
        assert load_public(head, source, prefix=prefix, verbose=False).prefix == "ema.head."
        assert torch.equal(head.query_embed.weight, two.decoder.query_embed.weight)
    assert "several" in _fails(_ml_decoder(), source, prefix="head.")
    assert "under the prefix 'nose'" in _fails(_ml_decoder(), source, prefix="nose")
    # The same state dict under two names is one; a head of the other family is no candidate.
    state = _with_backbone(one.state_dict())
    load_public(_ml_decoder(), {"model": state, "state_dict": state}, verbose=False)
    both = one.state_dict() | PublicCSRA(9, (1.0,), 0.1).state_dict()
    load_public(_ml_decoder(), both, verbose=False)
    load_public(CSRAHead(D, 9), both, verbose=False)
    with pytest.raises(CheckpointError, match="several"):
        head_from_public(both)


def test_report(capsys):
    state = {key: value.half() for key, value in _with_backbone(PublicDecoder(11, 4).state_dict()).items()}
    report = load_public(_ml_decoder(), {"state_dict": state})
    printed = capsys.readouterr().out
    assert isinstance(report, LoadReport)
    assert printed == f"{report}\n"
    assert len(report.casts) == len(report.mapped) == 19
    assert report.casts[0][1:] == (torch.float16, torch.float32)
    lines = printed.splitlines()
    assert lines[0] == "ml_decoder from a state dict: 19 tensors loaded"
    assert lines[2] == "  prefix   'state_dict.head.'"
    assert lines[-3:] == [
        "  ignored  beside the head 2: body 2",
        "  cast     19 tensors, torch.float16 to torch.float32",
        "  not in the file, so check: num_heads = 4",
    ]
    row = next(line for line in lines if "head.decoder.duplicate_pooling " in line)
    assert row.split() == ["head.decoder.duplicate_pooling", "->", "duplicate_pooling", "(4,", "16,", "3)"]
    load_public(_ml_decoder(), state, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_take_the_head_dtype(dtype):
    public, head = PublicDecoder(11, 4), _ml_decoder(dtype=dtype)
    assert load_public(head, public.state_dict(), verbose=False).casts[0][1:] == (torch.float32, dtype)
    assert torch.equal(head.query_embed.weight, public.decoder.query_embed.weight.to(dtype))


def test_missing_unexpected_and_wrong_keys_come_in_one_message():
    state = _with_backbone(PublicDecoder(11, 4).state_dict())
    del state["head.decoder.layers.0.norm2.bias"], state["head.decoder.query_embed.weight"]
    state["head.decoder.layers.0.linear1.weight"] = torch.zeros(25, E)
    state["head.decoder.embed_standart.bias"] = torch.zeros(E, dtype=torch.int64)
    state["head.decoder.layers.0.norm1.bias"] = 3
    state["head.decoder.norm.weight"] = torch.zeros(E)
    state["head.fc.bias"] = torch.zeros(5)
    message = _fails(_ml_decoder(), state)
    assert message.startswith("load_public: source must be a checkpoint of MLDecoder with C = 11, G = 4, J = 3, E = 16")
    for part in (
        "missing (2):",
        "head.decoder.layers.0.norm2.bias: (16,)",
        "head.decoder.query_embed.weight: (4, 16)",
        "unexpected (2):",
        "head.decoder.norm.weight: (16,)",
        "head.fc.bias: (5,)",
        "wrong shape (3):",
        "head.decoder.layers.0.linear1.weight: wanted (24, 16), found (25, 16)",
        "head.decoder.embed_standart.bias: wanted (16,), found (16,) torch.int64",
        "head.decoder.layers.0.norm1.bias: wanted (16,), found int",
        "looks like an ML-Decoder checkpoint of 11 classes, G = 4, J = 3, E = 16, D = 12",
    ):
        assert part in message
    assert "body" not in message


def test_every_missing_key_is_named():
    state = PublicDecoder(11, 4).state_dict()
    for key in state:
        message = _fails(_ml_decoder(), {k: v for k, v in state.items() if k != key})
        assert f"missing (1):\n    {key}: {tuple(state[key].shape)}" in message


def test_hundreds_of_keys_are_shortened():
    state = {f"classifier.multi_head.{i}.head.weight": torch.zeros(9, D, 1, 1) for i in range(300)}
    message = _fails(CSRAHead(D, 9), state)
    assert "unexpected (299):" in message
    assert "... and 275 more" in message
    assert message.count("\n") < 40


def test_other_classes_or_sizes_say_what_to_do():
    state = PublicDecoder(11, 4).state_dict()
    head = _ml_decoder(C=9)
    message = _fails(head, state)
    assert "duplicate_pooling_bias: wanted (9,), found (11,)" in message
    assert "head.reset(11, groups=4) first, or head_from_public(source)" in message
    head.reset(11, groups=4)
    load_public(head, state, verbose=False)
    message = _fails(MLDecoder(2 * D, 11, groups=4, embed_dim=E, num_heads=H, feedforward_dim=WIDTH), state)
    assert "use head_from_public(source)" in message
    csra = PublicCSRA(9, (1.0,), 0.1).state_dict()
    assert "use head.reset(9) first" in _fails(CSRAHead(D, 8), csra)
    assert "use head_from_public(source)" in _fails(CSRAHead(D, 9, num_heads=2), csra)


def test_another_kind_of_head_is_told():
    csra = PublicCSRA(80, (1.0,), 0.1).state_dict()
    message = _fails(_ml_decoder(), csra)
    assert "looks like a CSRA checkpoint of 1 head, 80 classes, D = 12" in message
    assert "looks like an ML-Decoder checkpoint of 11 classes" in _fails(
        CSRAHead(D, 9), PublicDecoder(11, 4).state_dict()
    )
    message = _fails(_ml_decoder(C=7, G=7), PublicDecoder(7, 7, self_attention=True).state_dict())
    assert "layers.0.self_attn.in_proj_weight: (48, 16)" in message
    assert "load it into a TransformerDecoder" in message
    grouped = PublicDecoder(11, 4, self_attention=True).state_dict()
    assert "no head of mlhead has both" in _fails(_ml_decoder(), grouped)
    with pytest.raises(CheckpointError, match="no head of mlhead has both"):
        head_from_public(grouped, num_heads=H)
    transformer = TransformerDecoder(D, 7, embed_dim=E, num_heads=H, feedforward_dim=WIDTH)
    message = _fails(transformer, PublicDecoder(7, 7).state_dict())
    assert "missing (4)" in message
    assert "load it into an MLDecoder" in message


# E, W, and whether there is a projection: public code has one but for E = W = 300.
WORDS = [(16, 30, True), (16, 16, True), (16, 16, False), (300, 300, False)]


@pytest.mark.parametrize("form", ["decoder", "flat"])
@pytest.mark.parametrize(("E", "W", "projected"), WORDS)
@pytest.mark.parametrize("prefix", ["", "head.", "module.model.head."])
def test_zero_shot_gives_the_public_logits_and_goes_back(form, E, W, projected, prefix):
    public, words, x = PublicZeroShot(E, W, form, projected).eval(), torch.randn(7, W), torch.randn(3, D, 5, 2)
    state = _with_backbone(public.state_dict(), prefix)
    assert (f"{prefix}wordvec_proj.weight" in state) == projected
    assert not any("query_embed" in key for key in state)
    rng = torch.get_rng_state()
    built = head_from_public(state, num_heads=H, word_vectors=words, verbose=False).eval()
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(built, ZeroShotMLDecoder)
    assert (built.num_classes, built.embed_dim, built.word_dim, built.used) == (7, E, W, "train")
    head = _zero_shot(E, W, word_vectors=words).eval()
    report = load_public(head, state, verbose=False)
    assert (report.kind, report.form, report.prefix) == ("zero_shot", form, prefix)
    assert report.ignored == {"body": 2}
    assert len(report.mapped) == len(public.state_dict()) == (20 if projected else 18)
    assert report.assumed == {"num_heads": H} | ({} if projected else {"wordvec_proj": "identity"})
    for each in (built, head):
        torch.testing.assert_close(each(x), public(x, words), rtol=1e-4, atol=1e-5)

    back = public_state_dict(head, form, prefix)
    assert not any("banks" in key for key in back)
    fresh = _zero_shot(E, W, word_vectors=words).eval()
    load_public(fresh, back, verbose=False)
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in fresh.state_dict().items())
    assert torch.equal(fresh(x), head(x))
    if projected or E == 300:  # else no public code, but what load_public takes
        assert back.keys() == {key for key in state if not key.startswith("body.")}
        other = PublicZeroShot(E, W, form, projected).eval()
        assert not any(other.load_state_dict({key[len(prefix) :]: value for key, value in back.items()}))
        assert torch.equal(other(x, words), public(x, words))


def test_zero_shot_word_vectors():
    public, x = PublicZeroShot(16, 30).double(), torch.randn(2, D, 3, 3)
    seen, unseen = torch.randn(7, 30), torch.randn(4, 30)
    state = public.state_dict()
    bare = head_from_public(state, num_heads=H, verbose=False)
    assert bare.used is None
    assert {p.dtype for p in bare.parameters()} == {torch.float64}
    torch.testing.assert_close(
        bare.eval()(x.double(), word_vectors=unseen.double()), public(x.double(), unseen.double())
    )
    head = head_from_public(
        state, num_heads=H, word_vectors={"seen": seen, "unseen": unseen}, dtype=torch.float32, verbose=False
    )
    assert (head.used, head.num_classes, head.bank("unseen").dtype) == ("seen", 7, torch.float32)
    head.use("unseen")
    torch.testing.assert_close(head.eval()(x), public.float()(x, unseen), rtol=1e-4, atol=1e-5)
    head.train()(x, torch.zeros(2, 4)).backward()
    assert head_from_public(state, num_heads=H, word_vectors={}, verbose=False).used is None
    with pytest.raises(ValueError, match="with W = word_dim = 30, got W = 31"):
        head_from_public(state, num_heads=H, word_vectors=torch.randn(7, 31), verbose=False)
    with pytest.raises(ValueError, match=r"word_vectors must be \(C, W\), got \(30,\)"):
        head_from_public(state, num_heads=H, word_vectors=torch.randn(30))
    with pytest.raises(TypeError, match=r"word_vectors must be a torch.Tensor, got list"):
        head_from_public(state, num_heads=H, word_vectors=[[0.0]])
    with pytest.raises(ValueError, match="word_vectors must be None for an ML-Decoder checkpoint of 11 classes"):
        head_from_public(PublicDecoder(11, 4).state_dict(), num_heads=H, word_vectors=seen)


def test_zero_shot_report():
    state = {key: value.half() for key, value in PublicZeroShot(16, 16, projected=False).state_dict().items()}
    lines = str(load_public(_zero_shot(16, 16), state, verbose=False)).splitlines()
    assert lines[0] == "zero_shot from a state dict: 18 tensors loaded"
    assert lines[-1] == "  not in the file, so check: num_heads = 4, wordvec_proj = identity"
    head = _zero_shot(groups=3, word_vectors=torch.randn(7, 30))
    state = {key: value.double() for key, value in head.state_dict().items()}
    report = load_public(_zero_shot(groups=3), state, verbose=False)
    assert ("banks.train", "banks.train", (7, 30)) in report.mapped
    assert ("banks.train", torch.float64, torch.float32) in report.casts
    assert report.assumed == {"num_heads": H, "group_size": 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zero_shot_without_a_projection_in_other_dtypes(dtype):
    head = _zero_shot(300, 300, dtype=dtype)
    load_public(head, PublicZeroShot(300, 300, projected=False).state_dict(), verbose=False)
    assert torch.equal(head.wordvec_proj.weight, torch.eye(300, dtype=dtype))
    assert not head.wordvec_proj.bias.any()
    assert len(public_state_dict(head)) == 18


def test_zero_shot_heads_without_a_public_form_are_refused():
    for change in (lambda h: h.wordvec_proj.weight[0, 1].fill_(0.1), lambda h: h.wordvec_proj.bias[3].fill_(0.1)):
        head = _zero_shot(300, 300)
        load_public(head, PublicZeroShot(300, 300, projected=False).state_dict(), verbose=False)
        with torch.no_grad():
            change(head)
        with pytest.raises(ValueError, match="wordvec_proj is the identity: at E = W = 300 public code has none"):
            public_state_dict(head)
    with pytest.raises(ValueError, match="public zero-shot code has no group decoding, got one with up to 3 classes"):
        public_state_dict(_zero_shot(groups=3))
    with pytest.raises(ValueError, match="head must be on a device with memory"):
        public_state_dict(_zero_shot(300, 300, device="meta"))
    assert "wordvec_proj.weight" in public_state_dict(_zero_shot(device="meta"))


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("W", [30, 16])
@pytest.mark.parametrize("prefix", ["", "module.", "model.head.", "decoder."])
def test_banks_in_own_checkpoints_survive(tmp_path, groups, W, prefix):
    seen, unseen, x = torch.randn(7, W), torch.randn(4, W), torch.randn(2, D, 3, 3)
    head = _zero_shot(16, W, groups=groups, word_vectors={"seen": seen, "unseen": unseen}).eval()
    torch.save({"state_dict": _with_backbone(head.state_dict(), prefix)}, tmp_path / "own.pt")
    fresh = _zero_shot(16, W, groups=groups).eval()
    report = load_public(fresh, tmp_path / "own.pt", verbose=False)
    assert report.form == ("decoder" if prefix == "decoder." else "own")
    assert sum(report.ignored.values()) == 2
    assert len(report.mapped) == len(head.state_dict())
    heads = [fresh]
    if groups is None:
        heads.append(head_from_public(tmp_path / "own.pt", num_heads=H, verbose=False).eval())
        others = head_from_public(tmp_path / "own.pt", num_heads=H, word_vectors=unseen, verbose=False)
        assert list(others.banks.sizes) == ["train"]
        assert torch.equal(others.bank(), unseen)
    for each in heads:
        assert (each.used, each.num_classes) == ("seen", 7)
        assert torch.equal(each(x), head(x))
        assert torch.equal(each.bank("unseen"), unseen)


def test_banks_that_the_file_has_not_stay():
    mine = torch.randn(2, 30)
    head = _zero_shot(C=2, word_vectors={"mine": mine, "other": torch.randn(3, 30)})
    source = _zero_shot(word_vectors={"new": torch.randn(7, 30), "other": torch.randn(5, 30)})
    load_public(head, source.state_dict(), verbose=False)
    assert head.banks.sizes == {"mine": 2, "other": 5, "new": 7}
    assert head.used == "mine"
    assert torch.equal(head.bank(), mine)
    load_public(head, PublicZeroShot(16, 30).state_dict(), verbose=False)
    assert head.banks.sizes == {"mine": 2, "other": 5, "new": 7}


def test_banks_that_do_not_fit():
    head = _zero_shot(word_vectors=torch.randn(7, 30))
    state = head.state_dict()
    for value, found in (
        (torch.randn(7, 31), "(7, 31)"),
        (torch.randn(30), "(30,)"),
        (torch.randn(0, 30), "(0, 30)"),
        (torch.ones(7, 30, dtype=torch.int64), "(7, 30) torch.int64"),
        (3, "int"),
    ):
        message = _fails(head, state | {"banks.train": value})
        assert f"wrong shape (1):\n    banks.train: wanted (C, 30), found {found}" in message
    assert "unexpected (1):\n    banks.a b: (7, 30)" in _fails(head, state | {"banks.a b": torch.randn(7, 30)})
    message = _fails(_ml_decoder(), PublicDecoder(11, 4).state_dict() | {"banks.train": torch.randn(7, 30)})
    assert "unexpected (1):\n    banks.train: (7, 30)" in message


@pytest.mark.parametrize(
    ("form", "E", "W", "projected"),
    [(form, *sizes) for form in ("decoder", "flat") for sizes in WORDS[:3]]
    + [("own", *sizes) for sizes in WORDS[:2]],  # which always has the projection
)
def test_every_missing_key_of_zero_shot_is_named(form, E, W, projected):
    own = form == "own"
    state, head = (_zero_shot(E, W) if own else PublicZeroShot(E, W, form, projected)).state_dict(), _zero_shot(E, W)
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        assert f"missing (1):\n    {key}: {tuple(state[key].shape)}" in _fails(head, rest)
        if projected or not key.endswith("duplicate_pooling"):  # nothing else says that it is zero-shot
            with pytest.raises(CheckpointError, match=rf"missing \(1\):\n    {re.escape(key)}(:|$)"):
                head_from_public(rest, num_heads=H)


def test_own_zero_shot_files_always_have_the_projection():
    state = {key: value for key, value in _zero_shot(16, 16).state_dict().items() if "wordvec_proj" not in key}
    missing = "missing (2):\n    wordvec_proj.weight{}\n    wordvec_proj.bias"
    assert missing.format(": (16, 16)") in _fails(_zero_shot(16, 16), state)
    with pytest.raises(CheckpointError, match=re.escape(missing.format(""))):
        head_from_public(state, num_heads=H)


def test_zero_shot_files_that_do_not_fit_say_what_to_do():
    full, own = PublicZeroShot(16, 30).state_dict(), _zero_shot(groups=3, word_vectors=torch.randn(7, 30)).state_dict()
    looks = "looks like a zero-shot ML-Decoder checkpoint of E = 16, W = 30, D = 12, feed-forward width 24"
    transformer = TransformerDecoder(D, 7, embed_dim=E, num_heads=H, feedforward_dim=WIDTH)
    for head in (_ml_decoder(), transformer):
        message = _fails(head, full)
        assert looks in message
        assert message.endswith("  word vectors as queries: load it into a ZeroShotMLDecoder")
        assert _fails(head, own).endswith("load it into a ZeroShotMLDecoder with groups")
    message = _fails(_zero_shot(groups=3), full)
    assert "a checkpoint of ZeroShotMLDecoder with E = 16, W = 30, D = 12, feed-forward width 24" in message
    assert "missing (2):\n    query_proj.weight: (5, 30)\n    class_proj.weight: (30, 16)" in message
    assert message.endswith("  full decoding: build it without groups")
    message = _fails(_zero_shot(), own)
    assert looks in message
    assert message.endswith("  group decoding: build it with groups")
    message = _fails(_zero_shot(W=31), full)
    assert "wordvec_proj.weight: wanted (16, 31), found (16, 30)" in message
    assert message.endswith("  use head_from_public(source), which builds a head of the file's sizes")
    message = _fails(_zero_shot(), PublicZeroShot(16, 16, projected=False).state_dict())
    assert "missing (2):\n    wordvec_proj.weight: (16, 30)\n    wordvec_proj.bias: (16,)" in message
    assert "head_from_public" not in _fails(_zero_shot(W=31, groups=3), own)
    assert "load it into an MLDecoder" in _fails(_zero_shot(), PublicDecoder(11, 4).state_dict())
    message = _fails(_zero_shot(), PublicDecoder(7, 7, self_attention=True).state_dict())
    assert "load it into a TransformerDecoder" in message
    assert "looks like a CSRA checkpoint" in _fails(_zero_shot(), PublicCSRA(9, (1.0,), 0.1).state_dict())
    extra = full | {"decoder.query_embed.weight": torch.randn(7, 16)}
    assert "unexpected (1):\n    decoder.query_embed.weight: (7, 16)" in _fails(_zero_shot(), extra)


def test_head_from_public_of_zero_shot_says_what_is_wrong():
    state = PublicZeroShot(16, 30).state_dict()
    with pytest.raises(CheckpointError, match=r"does not tell the size .*\n(.*\n)*    wordvec_proj.weight: \(16,\)"):
        head_from_public(state | {"wordvec_proj.weight": torch.zeros(16)})
    with pytest.raises(CheckpointError, match=r"duplicate_pooling: wanted \(16, 1\), found \(16, 2\)"):
        head_from_public(state | {"decoder.duplicate_pooling": torch.zeros(16, 2)}, num_heads=H)
    own = _zero_shot(groups=3, word_vectors=torch.randn(7, 30)).state_dict()
    must = "source must be of full decoding; how many classes share a query is in no checkpoint"
    with pytest.raises(
        CheckpointError, match=rf"{must}(.*\n)+.*build the ZeroShotMLDecoder with its groups, then load"
    ):
        head_from_public(own, num_heads=H)


def test_wordvec_proj_alone_is_no_head():
    """RAM and RAM++ have a layer of that name."""
    ram = {"wordvec_proj.weight": torch.randn(16, 30), "wordvec_proj.bias": torch.randn(16), "fc.bias": torch.ones(1)}
    for state in (ram, {"model": ram}):
        assert "without a known head (wordvec_proj 2, fc 1)" in _fails(_zero_shot(), state)
        with pytest.raises(CheckpointError, match="without a known head"):
            head_from_public(state)
    beside = {f"ram.{key}": value for key, value in ram.items()} | PublicDecoder(11, 4).state_dict()
    assert load_public(_ml_decoder(), beside, verbose=False).ignored == {"ram": 3}


def test_several_layers_are_told():
    state = PublicDecoder(11, 4).state_dict()
    state |= {key.replace("layers.0", "layers.1"): value for key, value in state.items() if "layers.0" in key}
    message = _fails(_ml_decoder(), state)
    assert "unexpected (14):" in message
    assert "2 decoder layers" in message


def test_published_number_of_classes_per_group():
    """int(C / G + 0.999) is 1, not 2, at 2001 classes in 2000 groups."""
    state = PublicDecoder(2001, 2000, J=int(2001 / 2000 + 0.999)).state_dict()
    assert state["decoder.duplicate_pooling"].shape == (2000, E, 1)
    reason = r"J = 1 is int\(C / G \+ 0.999\) as published, not ceil\(C / G\) = 2: 1 of the 2001 classes have no weight"
    with pytest.raises(CheckpointError, match=reason):
        load_public(_ml_decoder(2001, 2000), state)
    with pytest.raises(CheckpointError, match=reason):
        head_from_public(state, num_heads=H)
    with pytest.raises(CheckpointError, match="J = 5 is neither"):
        head_from_public(PublicDecoder(11, 4, J=5).state_dict(), num_heads=H)


@pytest.mark.parametrize("form", ["decoder", "flat"])
def test_head_from_public_reads_the_sizes(form):
    public = PublicDecoder(11, 4, form=form).double()
    state = _with_backbone(public.state_dict())
    before = torch.get_rng_state()
    head = head_from_public(state, num_heads=H, queries="learnable", verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(head, MLDecoder)
    assert (head.in_features, head.num_classes, head.groups, head.embed_dim) == (D, 11, 4, E)
    assert {(p.dtype, p.device.type) for p in head.parameters()} == {(torch.float64, "cpu")}
    assert all(p.requires_grad for p in head.parameters())
    x = torch.randn(2, D, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(head.eval()(x), public(x))
    single = head_from_public(public.state_dict(), num_heads=H, dtype=torch.float32, verbose=False)
    assert [name for name, p in single.named_parameters() if not p.requires_grad] == ["query_embed.weight"]
    assert single.duplicate_pooling.dtype == torch.float32
    single.train()(x.float()).sum().backward()


def test_head_from_public_of_csra():
    public = PublicCSRA(9, (1.0, 2.0, math.inf), 0.4)
    with pytest.raises(ValueError, match="temperatures must be given for 3 heads"):
        head_from_public(public.state_dict())
    head = head_from_public(public.state_dict(), temperatures=public.temperatures, lam=0.4, verbose=False)
    x = torch.randn(2, D, 3, 3)
    torch.testing.assert_close(head(x), public(x), rtol=1e-4, atol=1e-5)
    own = CSRAHead(D, 9, num_heads=2, bias=True)
    for state in (own.state_dict(), public_state_dict(own)):
        assert torch.equal(head_from_public(state, verbose=False)(x), own(x))


def test_head_from_public_says_what_is_missing():
    state = PublicDecoder(11, 4).state_dict()
    del state["decoder.embed_standart.weight"]
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    decoder.embed_standart.weight"):
        head_from_public(state)
    state["decoder.embed_standart.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"decoder.embed_standart.weight: \(3,\)"):
        head_from_public(state)
    with pytest.raises(ValueError, match="num_heads must be a divisor of embed_dim = 16, got 3"):
        head_from_public(PublicDecoder(11, 4).state_dict(), num_heads=3)
    with pytest.raises(ValueError, match="queries must be 'fixed' or 'learnable'"):
        head_from_public(PublicDecoder(11, 4).state_dict(), queries=torch.zeros(4, E))
    gap = {"classifier.multi_head.0.head.weight": torch.zeros(9, D, 1, 1), "classifier.multi_head.2.head.weight": 1}
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    classifier.multi_head.1.head.weight"):
        head_from_public(gap)


@pytest.mark.parametrize("legacy", [False, True])
def test_files(tmp_path, legacy):
    public = PublicDecoder(11, 4)
    path = tmp_path / "model.pth"
    content = {"state_dict": _with_backbone(public.state_dict()), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for source in (path, str(path)):
        head = _ml_decoder()
        report = load_public(head, source, verbose=False)
        assert report.source == str(path)
        assert torch.equal(head.query_embed.weight, public.decoder.query_embed.weight)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the package safetensors is not there")
    head = CSRAHead(D, 9, num_heads=2)
    path = tmp_path / "model.safetensors"
    safetensors.save_file(public_state_dict(head), path)
    assert torch.equal(head_from_public(path, verbose=False).weight, head.weight)
    path.write_bytes(path.read_bytes()[:50])
    assert "damaged or cut" in _fails(head, path)


def test_a_round_trip_through_a_file_of_the_public_form(tmp_path):
    head = _ml_decoder()
    torch.save(public_state_dict(head, "flat", "head."), tmp_path / "public.pt")
    built = head_from_public(tmp_path / "public.pt", num_heads=H, verbose=False)
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in built.state_dict().items())


def test_wrong_files(tmp_path):
    path, head = tmp_path / "model.pth", _ml_decoder()
    assert f"source must be an existing file, got {path}" in _fails(head, path)
    assert "must be a file, got the folder" in _fails(head, tmp_path)
    for content, said in (
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        (b"<!DOCTYPE html><html>please sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (bytes(range(256)), "another kind of file"),
        (b"just text", "another kind of file"),
    ):
        path.write_bytes(content)
        message = _fails(head, path)
        assert said in message
        assert str(path) in message
    torch.save({"model": PublicDecoder(11, 4).state_dict()}, path)
    whole = path.read_bytes()
    assert "(did you mean 'model.pth'?)" in _fails(head, tmp_path / "mdel.pth")
    for kept in (10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:kept])
        assert "damaged or cut" in _fails(head, path)
    at = len(whole) // 2  # among the values of a tensor, where torch.load would not notice
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "a damaged one: the checksum of" in _fails(head, path)
    torch.save([1, 2], path)
    assert f"got {path}, a list" in _fails(head, path)
    torch.save({"args": argparse.Namespace(lr=1), "model": PublicDecoder(11, 4).state_dict()}, path)
    assert "also holds argparse.Namespace, which is not run" in _fails(head, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_public(head, path, verbose=False)


def test_dictionaries_of_other_things():
    head = _ml_decoder()
    assert "holds no named tensors, but 'epoch', 'lr'" in _fails(head, {"epoch": 3, "lr": 0.1})
    assert "but nothing" in _fails(head, {})
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    assert "without a known head (conv1 1, layer1 1, fc 1)" in _fails(head, {"state_dict": resnet})
    vit = {"head1.weight": torch.zeros(80, D), "head.weight": torch.zeros(80, D)}
    assert "looks like a CSRA ViT under older names" in _fails(CSRAHead(D, 80), vit)
    one = {"classifier.head.weight": torch.zeros(80, D, 1, 1)}
    assert "rename it to classifier.multi_head.0.head.weight" in _fails(CSRAHead(D, 80), one)


def test_tensors_without_values_and_heads_without_memory():
    state = PublicDecoder(11, 4).state_dict()
    message = _fails(_ml_decoder(), {key: value.to("meta") for key, value in state.items()})
    assert "without values (on the meta device)" in message
    with pytest.raises(ValueError, match="head must be on a device with memory"):
        load_public(_ml_decoder(device="meta"), state)


def test_other_heads_and_sources_are_refused():
    class Features(nn.Module):
        num_features = D

        def forward_features(self, x):
            return x

    model = attach_head(Features(), _ml_decoder(), 11)
    with pytest.raises(TypeError, match="got HeadedModel; its head is its attribute `head`"):
        load_public(model, {})
    with pytest.raises(TypeError, match="an MLDecoder, TransformerDecoder, ZeroShotMLDecoder or CSRAHead, got GAPHead"):
        public_state_dict(GAPHead(D, 3))
    with pytest.raises(TypeError, match="a path or a state dict, got PublicDecoder; give its state_dict"):
        load_public(_ml_decoder(), PublicDecoder(11, 4))
    with pytest.raises(ValueError, match="form must be one of 'decoder', 'flat'"):
        public_state_dict(_ml_decoder(), "nested")


def test_the_state_dict_of_a_whole_model_of_ours():
    class Features(nn.Module):
        num_features = D

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, D, 1)

        def forward_features(self, x):
            return self.conv(x)

    for head, fresh in ((_ml_decoder(), _ml_decoder()), (CSRAHead(D, 11), CSRAHead(D, 11))):
        state = attach_head(Features(), head, 11).state_dict()
        report = load_public(fresh, state, verbose=False)
        assert (report.form, report.prefix, report.ignored) == ("own", "head.", {"backbone": 2})
        assert all(torch.equal(value, head.state_dict()[key]) for key, value in fresh.state_dict().items())


def test_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """The Python of docs/checkpoints.md prints what the page shows, but for rows left out."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md").read_text()
    blocks = re.findall(r"```(python)?\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec("".join(code for kind, code in blocks if kind), {})
    printed = capsys.readouterr().out.splitlines()
    for shown in [code for kind, code in blocks if not kind]:
        for line in shown.splitlines():
            assert line.strip() == "..." or line in printed, line
