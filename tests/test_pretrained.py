"""Public checkpoints: both key forms and CSRA give the logits of the public modules, whatever does not fit is told."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from public_modules import (
    WIDTH,
    D,
    E,
    H,
    PublicCSRA,
    PublicDecoder,
    load_fails,
    make_decoder,
    with_backbone,
)
from torch import nn

from mlhead import (
    CSRAHead,
    MLDecoder,
    TransformerDecoder,
    head_from_public,
    load_public,
    public_state_dict,
)
from mlhead.checkpoints import CheckpointError
from mlhead.pretrained import LoadReport


@pytest.mark.parametrize("form", ["decoder", "flat"])
@pytest.mark.parametrize(("C", "G"), [(11, 4), (8, 8), (9, 3), (21, 20), (5, 1)])
@pytest.mark.parametrize("queries", ["fixed", "learnable"])
def test_ml_decoder_gives_the_public_logits(form, C, G, queries):
    public, head = PublicDecoder(C, G, form=form).eval(), make_decoder(C, G, queries=queries).eval()
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
@pytest.mark.parametrize("make", [make_decoder, lambda: TransformerDecoder(D, 7, embed_dim=E, num_heads=H)])
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
    head = make_decoder()
    public = PublicDecoder(11, 4, form="flat")
    assert not any(public.load_state_dict(public_state_dict(head, "flat")))
    csra = PublicCSRA(9, (1.0, math.inf), 0.1)
    assert not any(csra.load_state_dict(public_state_dict(CSRAHead(D, 9, num_heads=2))))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"a": {"model": s}}])
@pytest.mark.parametrize("prefix", ["", "head.", "module.head.", "module.model.head.", "_orig_mod.classifier.decoder."])
def test_containers_and_prefixes_are_found(wrap, prefix):
    public = PublicDecoder(11, 4)
    head = make_decoder()
    report = load_public(head, wrap(OrderedDict(with_backbone(public.state_dict(), prefix))), verbose=False)
    assert report.prefix.endswith(prefix)
    assert report.ignored == {"body": 2}
    assert torch.equal(head.query_embed.weight, public.decoder.query_embed.weight)


def test_backbone_keys_are_counted_below_what_holds_the_model():
    state = with_backbone(PublicDecoder(11, 4).state_dict())
    wrapped = {"module." + key: value for key, value in state.items()} | {"loss.scale": torch.ones(1)}
    assert load_public(make_decoder(), wrapped, verbose=False).ignored == {"body": 2, "loss": 1}


def test_a_backbone_with_layers_and_a_detr_beside_the_head():
    state = PublicDecoder(11, 4, form="flat").state_dict() | {
        "layers.0.blocks.0.norm1.weight": torch.ones(3),
        "detr.decoder.layers.0.multihead_attn.in_proj_weight": torch.ones(3),
        "detr.query_embed.weight": torch.ones(3),
    }
    report = load_public(make_decoder(), state, verbose=False)
    assert report.ignored == {"detr": 2, "layers": 1}


def test_several_heads_need_a_prefix():
    one, two = PublicDecoder(11, 4), PublicDecoder(11, 4)
    source = {"model": with_backbone(one.state_dict()), "ema": with_backbone(two.state_dict())}
    message = load_fails(make_decoder(), source)
    assert "prefix one of those below" in message
    assert "'model.head.': an ML-Decoder checkpoint of 11 classes, G = 4" in message
    for prefix in ("ema.head.", "ema.head", "ema.head.decoder"):
        head = make_decoder()
        assert load_public(head, source, prefix=prefix, verbose=False).prefix == "ema.head."
        assert torch.equal(head.query_embed.weight, two.decoder.query_embed.weight)
    assert "several" in load_fails(make_decoder(), source, prefix="head.")
    assert "under the prefix 'nose'" in load_fails(make_decoder(), source, prefix="nose")
    # The same state dict under two names is one; a head of the other family is no candidate.
    state = with_backbone(one.state_dict())
    load_public(make_decoder(), {"model": state, "state_dict": state}, verbose=False)
    both = one.state_dict() | PublicCSRA(9, (1.0,), 0.1).state_dict()
    load_public(make_decoder(), both, verbose=False)
    load_public(CSRAHead(D, 9), both, verbose=False)
    with pytest.raises(CheckpointError, match="several"):
        head_from_public(both)


def test_report(capsys):
    state = {key: value.half() for key, value in with_backbone(PublicDecoder(11, 4).state_dict()).items()}
    report = load_public(make_decoder(), {"state_dict": state})
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
    load_public(make_decoder(), state, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_take_the_head_dtype(dtype):
    public, head = PublicDecoder(11, 4), make_decoder(dtype=dtype)
    assert load_public(head, public.state_dict(), verbose=False).casts[0][1:] == (torch.float32, dtype)
    assert torch.equal(head.query_embed.weight, public.decoder.query_embed.weight.to(dtype))


def test_missing_unexpected_and_wrong_keys_come_in_one_message():
    state = with_backbone(PublicDecoder(11, 4).state_dict())
    del state["head.decoder.layers.0.norm2.bias"], state["head.decoder.query_embed.weight"]
    state["head.decoder.layers.0.linear1.weight"] = torch.zeros(25, E)
    state["head.decoder.embed_standart.bias"] = torch.zeros(E, dtype=torch.int64)
    state["head.decoder.layers.0.norm1.bias"] = 3
    state["head.decoder.norm.weight"] = torch.zeros(E)
    state["head.fc.bias"] = torch.zeros(5)
    message = load_fails(make_decoder(), state)
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
        message = load_fails(make_decoder(), {k: v for k, v in state.items() if k != key})
        assert f"missing (1):\n    {key}: {tuple(state[key].shape)}" in message


def test_hundreds_of_keys_are_shortened():
    state = {f"classifier.multi_head.{i}.head.weight": torch.zeros(9, D, 1, 1) for i in range(300)}
    message = load_fails(CSRAHead(D, 9), state)
    assert "unexpected (299):" in message
    assert "... and 275 more" in message
    assert message.count("\n") < 40


def test_other_classes_or_sizes_say_what_to_do():
    state = PublicDecoder(11, 4).state_dict()
    head = make_decoder(C=9)
    message = load_fails(head, state)
    assert "duplicate_pooling_bias: wanted (9,), found (11,)" in message
    assert "head.reset(11, groups=4) first, or head_from_public(source)" in message
    head.reset(11, groups=4)
    load_public(head, state, verbose=False)
    message = load_fails(MLDecoder(2 * D, 11, groups=4, embed_dim=E, num_heads=H, feedforward_dim=WIDTH), state)
    assert "use head_from_public(source)" in message
    csra = PublicCSRA(9, (1.0,), 0.1).state_dict()
    assert "use head.reset(9) first" in load_fails(CSRAHead(D, 8), csra)
    assert "use head_from_public(source)" in load_fails(CSRAHead(D, 9, num_heads=2), csra)


def test_another_kind_of_head_is_told():
    csra = PublicCSRA(80, (1.0,), 0.1).state_dict()
    message = load_fails(make_decoder(), csra)
    assert "looks like a CSRA checkpoint of 1 head, 80 classes, D = 12" in message
    assert "looks like an ML-Decoder checkpoint of 11 classes" in load_fails(
        CSRAHead(D, 9), PublicDecoder(11, 4).state_dict()
    )
    message = load_fails(make_decoder(C=7, G=7), PublicDecoder(7, 7, self_attention=True).state_dict())
    assert "layers.0.self_attn.in_proj_weight: (48, 16)" in message
    assert "load it into a TransformerDecoder" in message
    grouped = PublicDecoder(11, 4, self_attention=True).state_dict()
    assert "no head of mlhead has both" in load_fails(make_decoder(), grouped)
    with pytest.raises(CheckpointError, match="no head of mlhead has both"):
        head_from_public(grouped, num_heads=H)
    transformer = TransformerDecoder(D, 7, embed_dim=E, num_heads=H, feedforward_dim=WIDTH)
    message = load_fails(transformer, PublicDecoder(7, 7).state_dict())
    assert "missing (4)" in message
    assert "load it into an MLDecoder" in message


def test_several_layers_are_told():
    state = PublicDecoder(11, 4).state_dict()
    state |= {key.replace("layers.0", "layers.1"): value for key, value in state.items() if "layers.0" in key}
    message = load_fails(make_decoder(), state)
    assert "unexpected (14):" in message
    assert "2 decoder layers" in message


def test_published_number_of_classes_per_group():
    """int(C / G + 0.999) is 1, not 2, at 2001 classes in 2000 groups."""
    state = PublicDecoder(2001, 2000, J=int(2001 / 2000 + 0.999)).state_dict()
    assert state["decoder.duplicate_pooling"].shape == (2000, E, 1)
    reason = r"J = 1 is int\(C / G \+ 0.999\) as published, not ceil\(C / G\) = 2: 1 of the 2001 classes have no weight"
    with pytest.raises(CheckpointError, match=reason):
        load_public(make_decoder(2001, 2000), state)
    with pytest.raises(CheckpointError, match=reason):
        head_from_public(state, num_heads=H)
    with pytest.raises(CheckpointError, match="J = 5 is neither"):
        head_from_public(PublicDecoder(11, 4, J=5).state_dict(), num_heads=H)
