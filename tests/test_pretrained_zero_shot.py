"""Public zero-shot checkpoints: the logits of the public module, word vectors, banks, whatever does not fit is told."""

from __future__ import annotations

import re

import pytest
import torch
from public_modules import (
    WIDTH,
    D,
    E,
    H,
    PublicCSRA,
    PublicDecoder,
    PublicZeroShot,
    load_fails,
    make_decoder,
    make_zero_shot,
    with_backbone,
)

from mlhead import (
    TransformerDecoder,
    ZeroShotMLDecoder,
    head_from_public,
    load_public,
    public_state_dict,
)
from mlhead.checkpoints import CheckpointError

# E, W, and whether there is a projection: public code has one but for E = W = 300.
WORDS = [(16, 30, True), (16, 16, True), (16, 16, False), (300, 300, False)]


@pytest.mark.parametrize("form", ["decoder", "flat"])
@pytest.mark.parametrize(("E", "W", "projected"), WORDS)
@pytest.mark.parametrize("prefix", ["", "head.", "module.model.head."])
def test_zero_shot_gives_the_public_logits_and_goes_back(form, E, W, projected, prefix):
    public, words, x = PublicZeroShot(E, W, form, projected).eval(), torch.randn(7, W), torch.randn(3, D, 5, 2)
    state = with_backbone(public.state_dict(), prefix)
    assert (f"{prefix}wordvec_proj.weight" in state) == projected
    assert not any("query_embed" in key for key in state)
    rng = torch.get_rng_state()
    built = head_from_public(state, num_heads=H, word_vectors=words, verbose=False).eval()
    assert torch.equal(torch.get_rng_state(), rng)
    assert isinstance(built, ZeroShotMLDecoder)
    assert (built.num_classes, built.embed_dim, built.word_dim, built.used) == (7, E, W, "train")
    head = make_zero_shot(E, W, word_vectors=words).eval()
    report = load_public(head, state, verbose=False)
    assert (report.kind, report.form, report.prefix) == ("zero_shot", form, prefix)
    assert report.ignored == {"body": 2}
    assert len(report.mapped) == len(public.state_dict()) == (20 if projected else 18)
    assert report.assumed == {"num_heads": H} | ({} if projected else {"wordvec_proj": "identity"})
    for each in (built, head):
        torch.testing.assert_close(each(x), public(x, words), rtol=1e-4, atol=1e-5)

    back = public_state_dict(head, form, prefix)
    assert not any("banks" in key for key in back)
    fresh = make_zero_shot(E, W, word_vectors=words).eval()
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
    lines = str(load_public(make_zero_shot(16, 16), state, verbose=False)).splitlines()
    assert lines[0] == "zero_shot from a state dict: 18 tensors loaded"
    assert lines[-1] == "  not in the file, so check: num_heads = 4, wordvec_proj = identity"
    head = make_zero_shot(groups=3, word_vectors=torch.randn(7, 30))
    state = {key: value.double() for key, value in head.state_dict().items()}
    report = load_public(make_zero_shot(groups=3), state, verbose=False)
    assert ("banks.train", "banks.train", (7, 30)) in report.mapped
    assert ("banks.train", torch.float64, torch.float32) in report.casts
    assert report.assumed == {"num_heads": H, "group_size": 3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_zero_shot_without_a_projection_in_other_dtypes(dtype):
    head = make_zero_shot(300, 300, dtype=dtype)
    load_public(head, PublicZeroShot(300, 300, projected=False).state_dict(), verbose=False)
    assert torch.equal(head.wordvec_proj.weight, torch.eye(300, dtype=dtype))
    assert not head.wordvec_proj.bias.any()
    assert len(public_state_dict(head)) == 18


def test_zero_shot_heads_without_a_public_form_are_refused():
    for change in (lambda h: h.wordvec_proj.weight[0, 1].fill_(0.1), lambda h: h.wordvec_proj.bias[3].fill_(0.1)):
        head = make_zero_shot(300, 300)
        load_public(head, PublicZeroShot(300, 300, projected=False).state_dict(), verbose=False)
        with torch.no_grad():
            change(head)
        with pytest.raises(ValueError, match="wordvec_proj is the identity: at E = W = 300 public code has none"):
            public_state_dict(head)
    with pytest.raises(ValueError, match="public zero-shot code has no group decoding, got one with up to 3 classes"):
        public_state_dict(make_zero_shot(groups=3))
    with pytest.raises(ValueError, match="head must be on a device with memory"):
        public_state_dict(make_zero_shot(300, 300, device="meta"))
    assert "wordvec_proj.weight" in public_state_dict(make_zero_shot(device="meta"))


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("W", [30, 16])
@pytest.mark.parametrize("prefix", ["", "module.", "model.head.", "decoder."])
def test_banks_in_own_checkpoints_survive(tmp_path, groups, W, prefix):
    seen, unseen, x = torch.randn(7, W), torch.randn(4, W), torch.randn(2, D, 3, 3)
    head = make_zero_shot(16, W, groups=groups, word_vectors={"seen": seen, "unseen": unseen}).eval()
    torch.save({"state_dict": with_backbone(head.state_dict(), prefix)}, tmp_path / "own.pt")
    fresh = make_zero_shot(16, W, groups=groups).eval()
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
    head = make_zero_shot(C=2, word_vectors={"mine": mine, "other": torch.randn(3, 30)})
    source = make_zero_shot(word_vectors={"new": torch.randn(7, 30), "other": torch.randn(5, 30)})
    load_public(head, source.state_dict(), verbose=False)
    assert head.banks.sizes == {"mine": 2, "other": 5, "new": 7}
    assert head.used == "mine"
    assert torch.equal(head.bank(), mine)
    load_public(head, PublicZeroShot(16, 30).state_dict(), verbose=False)
    assert head.banks.sizes == {"mine": 2, "other": 5, "new": 7}


def test_banks_that_do_not_fit():
    head = make_zero_shot(word_vectors=torch.randn(7, 30))
    state = head.state_dict()
    for value, found in (
        (torch.randn(7, 31), "(7, 31)"),
        (torch.randn(30), "(30,)"),
        (torch.randn(0, 30), "(0, 30)"),
        (torch.ones(7, 30, dtype=torch.int64), "(7, 30) torch.int64"),
        (3, "int"),
    ):
        message = load_fails(head, state | {"banks.train": value})
        assert f"wrong shape (1):\n    banks.train: wanted (C, 30), found {found}" in message
    assert "unexpected (1):\n    banks.a b: (7, 30)" in load_fails(head, state | {"banks.a b": torch.randn(7, 30)})
    message = load_fails(make_decoder(), PublicDecoder(11, 4).state_dict() | {"banks.train": torch.randn(7, 30)})
    assert "unexpected (1):\n    banks.train: (7, 30)" in message


@pytest.mark.parametrize(
    ("form", "E", "W", "projected"),
    [(form, *sizes) for form in ("decoder", "flat") for sizes in WORDS[:3]]
    + [("own", *sizes) for sizes in WORDS[:2]],  # which always has the projection
)
def test_every_missing_key_of_zero_shot_is_named(form, E, W, projected):
    own = form == "own"
    state = (make_zero_shot(E, W) if own else PublicZeroShot(E, W, form, projected)).state_dict()
    head = make_zero_shot(E, W)
    for key in state:
        rest = {k: v for k, v in state.items() if k != key}
        assert f"missing (1):\n    {key}: {tuple(state[key].shape)}" in load_fails(head, rest)
        if projected or not key.endswith("duplicate_pooling"):  # nothing else says that it is zero-shot
            with pytest.raises(CheckpointError, match=rf"missing \(1\):\n    {re.escape(key)}(:|$)"):
                head_from_public(rest, num_heads=H)


def test_own_zero_shot_files_always_have_the_projection():
    state = {key: value for key, value in make_zero_shot(16, 16).state_dict().items() if "wordvec_proj" not in key}
    missing = "missing (2):\n    wordvec_proj.weight{}\n    wordvec_proj.bias"
    assert missing.format(": (16, 16)") in load_fails(make_zero_shot(16, 16), state)
    with pytest.raises(CheckpointError, match=re.escape(missing.format(""))):
        head_from_public(state, num_heads=H)


def test_zero_shot_files_that_do_not_fit_say_what_to_do():
    full = PublicZeroShot(16, 30).state_dict()
    own = make_zero_shot(groups=3, word_vectors=torch.randn(7, 30)).state_dict()
    looks = "looks like a zero-shot ML-Decoder checkpoint of E = 16, W = 30, D = 12, feed-forward width 24"
    transformer = TransformerDecoder(D, 7, embed_dim=E, num_heads=H, feedforward_dim=WIDTH)
    for head in (make_decoder(), transformer):
        message = load_fails(head, full)
        assert looks in message
        assert message.endswith("  word vectors as queries: load it into a ZeroShotMLDecoder")
        assert load_fails(head, own).endswith("load it into a ZeroShotMLDecoder with groups")
    message = load_fails(make_zero_shot(groups=3), full)
    assert "a checkpoint of ZeroShotMLDecoder with E = 16, W = 30, D = 12, feed-forward width 24" in message
    assert "missing (2):\n    query_proj.weight: (5, 30)\n    class_proj.weight: (30, 16)" in message
    assert message.endswith("  full decoding: build it without groups")
    message = load_fails(make_zero_shot(), own)
    assert looks in message
    assert message.endswith("  group decoding: build it with groups")
    message = load_fails(make_zero_shot(W=31), full)
    assert "wordvec_proj.weight: wanted (16, 31), found (16, 30)" in message
    assert message.endswith("  use head_from_public(source), which builds a head of the file's sizes")
    message = load_fails(make_zero_shot(), PublicZeroShot(16, 16, projected=False).state_dict())
    assert "missing (2):\n    wordvec_proj.weight: (16, 30)\n    wordvec_proj.bias: (16,)" in message
    assert "head_from_public" not in load_fails(make_zero_shot(W=31, groups=3), own)
    assert "load it into an MLDecoder" in load_fails(make_zero_shot(), PublicDecoder(11, 4).state_dict())
    message = load_fails(make_zero_shot(), PublicDecoder(7, 7, self_attention=True).state_dict())
    assert "load it into a TransformerDecoder" in message
    assert "looks like a CSRA checkpoint" in load_fails(make_zero_shot(), PublicCSRA(9, (1.0,), 0.1).state_dict())
    extra = full | {"decoder.query_embed.weight": torch.randn(7, 16)}
    assert "unexpected (1):\n    decoder.query_embed.weight: (7, 16)" in load_fails(make_zero_shot(), extra)


def test_head_from_public_of_zero_shot_says_what_is_wrong():
    state = PublicZeroShot(16, 30).state_dict()
    with pytest.raises(CheckpointError, match=r"does not tell the size .*\n(.*\n)*    wordvec_proj.weight: \(16,\)"):
        head_from_public(state | {"wordvec_proj.weight": torch.zeros(16)})
    with pytest.raises(CheckpointError, match=r"duplicate_pooling: wanted \(16, 1\), found \(16, 2\)"):
        head_from_public(state | {"decoder.duplicate_pooling": torch.zeros(16, 2)}, num_heads=H)
    own = make_zero_shot(groups=3, word_vectors=torch.randn(7, 30)).state_dict()
    must = "source must be of full decoding; how many classes share a query is in no checkpoint"
    with pytest.raises(
        CheckpointError, match=rf"{must}(.*\n)+.*build the ZeroShotMLDecoder with its groups, then load"
    ):
        head_from_public(own, num_heads=H)


def test_wordvec_proj_alone_is_no_head():
    """RAM and RAM++ have a layer of that name."""
    ram = {"wordvec_proj.weight": torch.randn(16, 30), "wordvec_proj.bias": torch.randn(16), "fc.bias": torch.ones(1)}
    for state in (ram, {"model": ram}):
        assert "without a known head (wordvec_proj 2, fc 1)" in load_fails(make_zero_shot(), state)
        with pytest.raises(CheckpointError, match="without a known head"):
            head_from_public(state)
    beside = {f"ram.{key}": value for key, value in ram.items()} | PublicDecoder(11, 4).state_dict()
    assert load_public(make_decoder(), beside, verbose=False).ignored == {"ram": 3}
