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

    def __init__(self, C, G, J=None, form="decoder", self_attention=False):
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
        outer, layer = self.outer[0], self.decoder.layers[0]
        memory = F.relu(outer.embed_standart(x.flatten(2).transpose(1, 2))).transpose(0, 1)
        q = outer.query_embed.weight[:, None].expand(-1, x.shape[0], -1)
        residual = layer.self_attn(q, q, q)[0] if hasattr(layer, "self_attn") else q
        t = layer.norm1(q + residual)
        t = layer.norm2(t + layer.multihead_attn(t, memory, memory)[0])
        t = layer.norm3(t + layer.linear2(F.relu(layer.linear1(t))))
        logits = torch.cat([t[g] @ outer.duplicate_pooling[g] for g in range(self.G)], 1)
        return logits[:, : self.C] + outer.duplicate_pooling_bias


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


def test_zero_shot_is_refused():
    state = PublicDecoder(11, 4).state_dict()
    del state["decoder.query_embed.weight"]
    state["decoder.duplicate_pooling"], state["decoder.duplicate_pooling_bias"] = torch.randn(E, 1), torch.randn(1)
    for extra in ({}, {"wordvec_proj.weight": torch.randn(E, 300), "wordvec_proj.bias": torch.randn(E)}):
        message = _fails(_ml_decoder(), state | extra)
        assert "zero-shot ML-Decoder is not in it yet" in message
        with pytest.raises(CheckpointError, match="zero-shot"):
            head_from_public(state | extra)


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
    with pytest.raises(TypeError, match="an MLDecoder, TransformerDecoder or CSRAHead, got GAPHead"):
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
