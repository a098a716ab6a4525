"""Heads made of public checkpoints, files in every form, and what is no checkpoint at all."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import torch
from public_modules import (
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
    GAPHead,
    MLDecoder,
    attach_head,
    head_from_public,
    load_public,
    public_state_dict,
)
from mlhead.checkpoints import CheckpointError


@pytest.mark.parametrize("form", ["decoder", "flat"])
def test_head_from_public_reads_the_sizes(form):
    public = PublicDecoder(11, 4, form=form).double()
    state = with_backbone(public.state_dict())
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
    content = {"state_dict": with_backbone(public.state_dict()), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for source in (path, str(path)):
        head = make_decoder()
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
    assert "damaged or cut" in load_fails(head, path)


def test_a_round_trip_through_a_file_of_the_public_form(tmp_path):
    head = make_decoder()
    torch.save(public_state_dict(head, "flat", "head."), tmp_path / "public.pt")
    built = head_from_public(tmp_path / "public.pt", num_heads=H, verbose=False)
    assert all(torch.equal(value, head.state_dict()[key]) for key, value in built.state_dict().items())


def test_wrong_files(tmp_path):
    path, head = tmp_path / "model.pth", make_decoder()
    assert f"source must be an existing file, got {path}" in load_fails(head, path)
    assert "must be a file, got the folder" in load_fails(head, tmp_path)
    for content, said in (
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG image"),
        (b"<!DOCTYPE html><html>please sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (bytes(range(256)), "another kind of file"),
        (b"just text", "another kind of file"),
    ):
        path.write_bytes(content)
        message = load_fails(head, path)
        assert said in message
        assert str(path) in message
    torch.save({"model": PublicDecoder(11, 4).state_dict()}, path)
    whole = path.read_bytes()
    assert "(did you mean 'model.pth'?)" in load_fails(head, tmp_path / "mdel.pth")
    for kept in (10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:kept])
        assert "damaged or cut" in load_fails(head, path)
    at = len(whole) // 2  # among the values of a tensor, where torch.load would not notice
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "a damaged one: the checksum of" in load_fails(head, path)
    torch.save([1, 2], path)
    assert f"got {path}, a list" in load_fails(head, path)
    torch.save({"args": argparse.Namespace(lr=1), "model": PublicDecoder(11, 4).state_dict()}, path)
    assert "also holds argparse.Namespace, which is not run" in load_fails(head, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_public(head, path, verbose=False)


def test_dictionaries_of_other_things():
    head = make_decoder()
    assert "holds no named tensors, but 'epoch', 'lr'" in load_fails(head, {"epoch": 3, "lr": 0.1})
    assert "but nothing" in load_fails(head, {})
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    assert "without a known head (conv1 1, layer1 1, fc 1)" in load_fails(head, {"state_dict": resnet})
    vit = {"head1.weight": torch.zeros(80, D), "head.weight": torch.zeros(80, D)}
    assert "looks like a CSRA ViT under older names" in load_fails(CSRAHead(D, 80), vit)
    one = {"classifier.head.weight": torch.zeros(80, D, 1, 1)}
    assert "rename it to classifier.multi_head.0.head.weight" in load_fails(CSRAHead(D, 80), one)


def test_tensors_without_values_and_heads_without_memory():
    state = PublicDecoder(11, 4).state_dict()
    message = load_fails(make_decoder(), {key: value.to("meta") for key, value in state.items()})
    assert "without values (on the meta device)" in message
    with pytest.raises(ValueError, match="head must be on a device with memory"):
        load_public(make_decoder(device="meta"), state)


def test_other_heads_and_sources_are_refused():
    class Features(nn.Module):
        num_features = D

        def forward_features(self, x):
            return x

    model = attach_head(Features(), make_decoder(), 11)
    with pytest.raises(TypeError, match="got HeadedModel; its head is its attribute `head`"):
        load_public(model, {})
    with pytest.raises(TypeError, match="an MLDecoder, TransformerDecoder, ZeroShotMLDecoder or CSRAHead, got GAPHead"):
        public_state_dict(GAPHead(D, 3))
    with pytest.raises(TypeError, match="a path or a state dict, got PublicDecoder; give its state_dict"):
        load_public(make_decoder(), PublicDecoder(11, 4))
    with pytest.raises(ValueError, match="form must be one of 'decoder', 'flat'"):
        public_state_dict(make_decoder(), "nested")


def test_the_state_dict_of_a_whole_model_of_ours():
    class Features(nn.Module):
        num_features = D

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, D, 1)

        def forward_features(self, x):
            return self.conv(x)

    for head, fresh in ((make_decoder(), make_decoder()), (CSRAHead(D, 11), CSRAHead(D, 11))):
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
