"""The zero-shot ML-Decoder head against the paper's formulas written out, its banks, its augmentation, its top k."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak import printed_by
from torch import Tensor

from mlhead import QueryAugmentation, SparseTargets, ZeroShotMLDecoder, attach_head, record_backends
from mlhead.losses import AsymmetricLoss, SoftmaxCrossEntropy

D, W, E = 12, 9, 16
SMALL: dict[str, Any] = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.0}
KINDS = {"full": None, "groups": 5}
every_kind = pytest.mark.parametrize("groups", KINDS.values(), ids=KINDS.keys())


def make(C: int, groups: int | None = None, **options: Any) -> ZeroShotMLDecoder:
    torch.manual_seed(C)
    return ZeroShotMLDecoder(D, C, **{"word_vectors": torch.randn(C, W), "groups": groups, **SMALL, **options})


def decode(head: ZeroShotMLDecoder, q: Tensor, tokens: Tensor) -> Tensor:
    """The decoder layer by torch's modules, without dropout."""
    layer, attention = head.layers[0], head.layers[0].multihead_attn
    memory = F.relu(head.embed_standart(tokens))
    t = layer.norm1(2 * q).expand(len(tokens), -1, -1)
    attended, _ = F.multi_head_attention_forward(
        t.transpose(0, 1), memory.transpose(0, 1), memory.transpose(0, 1), E, 2,
        attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias,
    )  # fmt: skip
    t = layer.norm2(t + attended.transpose(0, 1))
    return layer.norm3(t + layer.linear2(F.relu(layer.linear1(t))))


def by_the_paper(head: ZeroShotMLDecoder, words: Tensor, tokens: Tensor) -> Tensor:
    """Section 2.3.3 and Appendix B and M, loops and all: the (G, E, J) weight is built here."""
    if head.full:
        h = decode(head, F.relu(words @ head.wordvec_proj.weight.T + head.wordvec_proj.bias), tokens)
        return (h @ head.duplicate_pooling)[..., 0] + head.duplicate_pooling_bias
    C, G = len(words), math.ceil(len(words) / head.group_size)
    J = math.ceil(C / G)
    queries, weight = torch.zeros(G, E, dtype=words.dtype), torch.zeros(G, E, J, dtype=words.dtype)
    Wa, Wb = head.query_proj.weight, head.class_proj.weight.T
    d = len(Wa)
    for c in range(C):
        queries[c // J, (c % J) * d : (c % J + 1) * d] = Wa @ words[c]
        weight[c // J, :, c % J] = Wb @ words[c]
    h = decode(head, queries, tokens)
    logits = torch.stack([h[:, k] @ weight[k] for k in range(G)], 1).flatten(1)[:, :C]
    return logits + head.duplicate_pooling_bias


@every_kind
@pytest.mark.parametrize("C", [1, 5, 12, 13, 21])
def test_is_the_papers_formula(groups: int | None, C: int) -> None:
    """Also for class counts that the groups do not divide, and for other classes than at construction."""
    head = make(C, groups).double()
    head.duplicate_pooling_bias.data.fill_(0.3)
    tokens = torch.randn(3, 6, D, dtype=torch.float64)
    for words in (head.bank(), torch.randn(7, W).double(), torch.randn(2 * C + 3, W).double()):
        expected = by_the_paper(head, words, tokens)
        torch.testing.assert_close(head(tokens, word_vectors=words), expected)
        maps = tokens.transpose(1, 2).unflatten(2, (2, 3))
        torch.testing.assert_close(head(maps, word_vectors=words), expected)
        mine = torch.autograd.grad(head(tokens, word_vectors=words).square().sum(), list(head.parameters()))
        theirs = torch.autograd.grad(expected.square().sum(), list(head.parameters()))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_no_weight_is_built() -> None:
    """Group decoding reads the bank itself, in place, as the weight of group_fc."""
    head = make(20, 5)
    seen = {}

    def watched(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen["weight"] = weight
        return torch.zeros(len(h), len(bias))

    from mlhead.heads import zero_shot

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "group_fc", watched)
        head(torch.randn(2, 4, D))
    assert seen["weight"].shape == (5, W, 4)
    assert seen["weight"].data_ptr() == head.bank().data_ptr()


def test_order_and_company_change_no_logit_in_full_decoding() -> None:
    head = make(30).double()
    x, words = torch.randn(2, 5, D).double(), head.bank()
    logits, order = head(x), torch.randperm(30)
    torch.testing.assert_close(head(x, word_vectors=words[order]), logits[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(x, word_vectors=words[7:9]), logits[:, 7:9], rtol=1e-12, atol=1e-12)
    grouped = make(30, 6).double()
    x = torch.randn(2, 5, D).double()
    assert (grouped(x, word_vectors=words[order]) - grouped(x, word_vectors=words)[:, order]).abs().max() > 1e-3


@every_kind
def test_word_vectors_of_a_call_get_a_gradient(groups: int | None) -> None:
    """Prompts can be learned; banks get none."""
    head = make(12, groups)
    words = torch.randn(7, W, requires_grad=True)
    head(torch.randn(2, 5, D), torch.zeros(2, 7), word_vectors=words).backward()
    assert words.grad is not None
    assert (words.grad.abs().sum(1) > 0).all()
    assert not head.bank().requires_grad


class TestBanks:
    @every_kind
    def test_swap_without_touching_a_parameter(self, groups: int | None) -> None:
        seen, unseen = torch.randn(12, W), torch.randn(7, W)
        banks = {"train": seen, "test": unseen, "union": torch.cat([seen, unseen])}
        head = make(12, groups, word_vectors=banks)
        before = copy.deepcopy(dict(head.named_parameters()))
        x = torch.randn(2, 5, D)
        assert (head.used, head.num_classes) == ("train", 12)
        for name, words in banks.items():
            head.use(name)
            assert (head.used, head.num_classes) == (name, len(words))
            assert torch.equal(head.bank(), words)
            assert torch.equal(head.bank(name), words)
            assert torch.equal(head(x), head(x, word_vectors=words))
        assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())
        head.set_bank("train", unseen)
        head.use("train")
        assert torch.equal(head(x), head(x, word_vectors=unseen))

    @every_kind
    def test_state_dict_brings_banks_of_any_size_and_name(self, groups: int | None) -> None:
        head = make(12, groups, word_vectors={"train": torch.randn(12, W), "wordnet": torch.randn(31, W)})
        state, x = head.state_dict(), torch.randn(2, 5, D)
        assert {k: tuple(v.shape) for k, v in state.items() if "bank" in k} == {
            "banks.train": (12, W),
            "banks.wordnet": (31, W),
        }
        for other in (
            ZeroShotMLDecoder(D, 12, word_dim=W, groups=groups, **SMALL),
            make(12, groups, word_vectors={"train": torch.randn(12, W)}),
        ):
            other.load_state_dict(state)
            assert other.num_classes == 12
            assert torch.equal(other(x), head(x))
            other.use("wordnet")
            assert torch.equal(other(x), head(x, word_vectors=head.bank("wordnet")))
        low = ZeroShotMLDecoder(D, 12, word_dim=W, groups=groups, **SMALL, dtype=torch.bfloat16)
        low.load_state_dict(state)
        assert low.bank().dtype == torch.bfloat16
        twin = copy.deepcopy(head)
        twin.set_bank("train", torch.zeros(3, W))
        assert head.num_classes == 12

    def test_loading_says_what_does_not_fit(self) -> None:
        head, other = make(12), make(12, word_vectors={"other": torch.randn(12, W)})
        with pytest.raises(RuntimeError, match=r"Missing key.*banks\.other"):
            other.load_state_dict(head.state_dict())
        state = {**head.state_dict(), "banks.train": torch.zeros(3, W + 1)}
        with pytest.raises(RuntimeError, match=r"bank 'train'.*word_vectors must be \(C, W\) with W = 9"):
            head.load_state_dict(state)

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({"a b": torch.randn(3, W)}, "name must be an identifier"),
            ({"other": torch.randn(0, W)}, r"word_vectors must be \(C, W\) with W = 9 and C > 0"),
        ],
        ids=["name", "no classes"],
    )
    def test_a_reset_that_fails_changes_nothing(self, second: dict[str, Tensor], message: str) -> None:
        head = make(12, 5)
        head.use("train")
        before = head.bank()
        with pytest.raises(ValueError, match=message):
            head.reset(4, word_vectors={"first": torch.randn(4, W), **second})
        assert (head.num_classes, head.used, list(head.banks.sizes)) == (12, "train", ["train"])
        assert torch.equal(head.bank(), before)

    def test_reset(self) -> None:
        head = make(12, 5)
        before = head.query_proj.weight.clone()
        head.reset(40)
        assert head.num_classes == 40
        with pytest.raises(ValueError, match="word_vectors must be given, or set as a bank by set_bank, got None"):
            head(torch.randn(2, 5, D))
        head.reset(40, word_vectors=torch.randn(40, W))
        assert head(torch.randn(2, 5, D)).shape == (2, 40)
        assert torch.equal(head.query_proj.weight, before)

    def test_on_a_model(self) -> None:
        class Backbone(torch.nn.Module):
            num_features = D

            def __init__(self) -> None:
                super().__init__()
                self.conv = torch.nn.Conv2d(3, D, 4, 4)

            def forward_features(self, x: Tensor) -> Tensor:
                return self.conv(x)

        banks = {"train": torch.randn(12, W), "test": torch.randn(4, W)}
        model = attach_head(Backbone(), "zero_shot", 12, word_vectors=banks, **SMALL)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 12)
        model.head.use("test")
        assert model.num_classes == 4
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


@every_kind
def test_attention_maps_are_those_of_the_classes_queries(groups: int | None) -> None:
    head, x = make(13, groups).eval(), torch.randn(3, 6, D)
    maps = head.attention_maps(x, range(13))
    assert maps.shape == (3, 13, 6)
    torch.testing.assert_close(maps.sum(2), torch.ones(3, 13))
    J = head.banks.group_size_of(13)
    assert torch.equal(maps[:, 0], maps[:, J - 1])
    assert not torch.allclose(maps[:, 0], maps[:, J])
    own = torch.tensor([[0, 12], [3, 3], [7, 1]])
    for b in range(3):
        torch.testing.assert_close(head.attention_maps(x, own)[b], maps[b, own[b]])
    # Values that are 1 at one position show that position's weight, through the same layer.
    layer, memory = head.layers[0], F.relu(head.embed_standart(x))
    q = head._queries(head.banks.rows("train"), J)
    _, weights = F.multi_head_attention_forward(
        layer.norm1(2 * q).unsqueeze(1).expand(-1, 3, -1), memory.transpose(0, 1), memory.transpose(0, 1), E, 2,
        layer.multihead_attn.in_proj_weight, layer.multihead_attn.in_proj_bias, None, None, False, 0.0,
        layer.multihead_attn.out_proj.weight, layer.multihead_attn.out_proj.bias,
    )  # fmt: skip
    torch.testing.assert_close(maps, weights[:, [c // J for c in range(13)]])
    for nothing in ([], [[], [], []]):
        assert head.attention_maps(x, nothing).shape == (3, 0, 6)
    with pytest.raises(ValueError, match=r"classes must be in \[0, 4\)"):
        head.attention_maps(x, [4], word_vectors=torch.randn(4, W))


class TestSteps:
    """Queries decoded a few at a time, with backward computing them again."""

    @every_kind
    @pytest.mark.parametrize("loss", [None, "asl", "softmax"])
    def test_change_nothing(self, groups: int | None, loss: str | None) -> None:
        head = make(23, groups).double()
        x, labels = torch.randn(3, 5, D).double(), SparseTargets.from_lists([[1], [22], [5]], 23)
        if loss is not None:
            head.loss = AsymmetricLoss() if loss == "asl" else SoftmaxCrossEntropy()

        def value() -> Tensor:
            return head(x).square().mean() if loss is None else head(x, labels)

        parameters = list(head.parameters())
        whole = value()
        expected = torch.autograd.grad(whole, parameters)
        head.query_step = 2
        parts = value()
        torch.testing.assert_close(parts, whole)
        for a, b in zip(torch.autograd.grad(parts, parameters), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(head(x, pre_logits=True), make_whole(head, x))

    def test_dropout_repeats_in_the_second_computation(self) -> None:
        """Gradients of a step that draws again would not be those of the loss: held against a difference quotient."""
        head = make(9, dropout=0.3, query_step=2).double()
        x, direction = torch.randn(2, 5, D).double(), torch.randn(E).double()

        def value(t: float) -> Tensor:
            torch.manual_seed(3)
            with torch.no_grad():
                head.embed_standart.bias.copy_(start + t * direction)
            return head(x).square().sum()

        start = head.embed_standart.bias.detach().clone()
        (gradient,) = torch.autograd.grad(value(0.0), head.embed_standart.bias)
        quotient = (value(1e-6) - value(-1e-6)).item() / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(quotient, rel=1e-5)

    def test_memory_of_evaluation_does_not_grow_with_the_vocabulary(self) -> None:
        script = """
import sys, torch
from mlhead import ZeroShotMLDecoder
from mlhead._resident import peak
torch.set_num_threads(1)
C, groups = int(sys.argv[1]), int(sys.argv[2]) or None
small = dict(word_dim=8, embed_dim=64, num_heads=2, feedforward_dim=128)
head = ZeroShotMLDecoder(16, 2000, groups=groups and 250, **small).eval()
x, words = torch.randn(4, 9, 16), torch.randn(C, 8)
head.topk(x, 5, word_vectors=words[:2000])
from mlhead.heads import zero_shot
zero_shot.STEP_ELEMENTS = 1 << 20
head.topk(x, 5, word_vectors=words[:30000])
before = peak()
head.topk(x, 5, word_vectors=words)
print(peak() - before)
"""
        for groups in (0, 1):
            grown = printed_by(script, 240_000, groups)
            # All decoded queries of 240,000 classes would take 246 MB in full decoding and 31 MB in groups of 8, what
            # precedes them several times that.
            assert grown < (12e6 if groups == 0 else 20e6), (groups, grown)


def make_whole(head: ZeroShotMLDecoder, x: Tensor) -> Tensor:
    """The decoded queries in one step."""
    step, head.query_step = head.query_step, None
    h = head(x, pre_logits=True)
    head.query_step = step
    return h


@every_kind
@pytest.mark.parametrize("step", [None, 2])
def test_topk_is_that_of_the_logits(groups: int | None, step: int | None) -> None:
    head, x = make(23, groups, query_step=step).eval(), torch.randn(4, 5, D)
    words = torch.randn(31, W)
    for given in (None, words):
        logits = head(x, word_vectors=given)
        scores, classes = head.topk(x, 6, word_vectors=given)
        torch.testing.assert_close(scores, torch.topk(logits, 6).values)
        torch.testing.assert_close(logits.gather(1, classes), scores)
        assert not scores.requires_grad
    scores, classes = head.topk(x, 23)
    assert all(sorted(row) == list(range(23)) for row in classes.tolist())
    for k in (0, 24):
        with pytest.raises(ValueError, match=r"ZeroShotMLDecoder: k must be"):
            head.topk(x, k)


class TestAugmentation:
    def test_is_off_in_evaluation_and_repeats_by_seed(self) -> None:
        words = torch.randn(12, W)
        augmentation = QueryAugmentation(noise=0.1, random_queries=4)
        torch.manual_seed(1)
        queries, vectors = augmentation(words)
        assert queries.shape == vectors.shape == (16, W)
        assert torch.equal(vectors[:12], words)
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(augmentation(words), (queries, vectors), strict=True))
        assert not torch.equal(augmentation(words)[0], queries)
        augmentation.eval()
        assert all(t is words for t in augmentation(words))
        assert augmentation.extra == 0
        y = torch.zeros(2, 12)
        assert augmentation.extend(y, 12) is y

    def test_noise_has_its_size(self) -> None:
        words = 3 * torch.randn(2000, 50)
        queries, vectors = QueryAugmentation(noise=0.1)(words)
        assert vectors is words
        difference = queries - words
        assert difference.std().item() == pytest.approx(0.1 * words.square().mean().sqrt().item(), rel=0.02)
        assert difference.mean().abs() < 0.01

    @pytest.mark.parametrize("distribution", ["normal", "uniform", "shuffled"])
    def test_random_queries_look_like_the_words(self, distribution: str) -> None:
        words = torch.randn(500, 4) * torch.tensor([0.1, 1.0, 5.0, 0.0]) + torch.tensor([0.0, 3.0, -2.0, 7.0])
        drawn = QueryAugmentation(random_queries=20_000, distribution=distribution)(words)[1][500:]
        torch.testing.assert_close(drawn.mean(0), words.mean(0), rtol=0.02, atol=0.1)
        torch.testing.assert_close(drawn.std(0), words.std(0, correction=0), rtol=0.03, atol=1e-3)
        if distribution == "shuffled":
            assert set(drawn[:, 0].tolist()) <= set(words[:, 0].tolist())
        if distribution == "uniform":
            assert (drawn[:, 1] - words[:, 1].mean()).abs().max() < 1.8 * words[:, 1].std()

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
    @pytest.mark.parametrize("target", [1.0, 0.0, 0.5])
    def test_targets_are_appended(self, target: float) -> None:
        augmentation = QueryAugmentation(random_queries=3, target=target)
        y = torch.zeros(4, 12)
        y[0, 3] = y[0, 11] = y[2, 0] = y[3, 5] = 1
        expected = torch.cat([y, torch.full((4, 3), target)], 1)
        assert torch.equal(augmentation.extend(y, 12), expected)
        sparse = SparseTargets.from_dense(y)
        rows = [y[b].nonzero()[:, 0].tolist() for b in range(4)]
        pair = torch.tensor([c for row in rows for c in row]), sparse.offsets
        for form in (sparse, pair, y.to_sparse_csr(), SparseTargets.from_dense(y * 1.0)):
            made = augmentation.extend(form, 12)
            assert isinstance(made, SparseTargets)
            made.check("test", "targets")
            assert made.num_classes == 15
            assert torch.equal(made.to_dense(), expected)
        unknown = SparseTargets.from_lists([[3], [], [0], [5]], 12, ignore=[[4], [1, 2], [], []])
        assert torch.equal(augmentation.extend(unknown, 12).to_dense()[:, :12], unknown.to_dense())
        with pytest.raises(ValueError, match=r"targets must be y \(B, C\) or sparse positives, with random queries"):
            augmentation.extend(torch.tensor([1, 2, 3, 4]), 12)

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            ([[1], [2]], "targets must be a tensor .*, got list"),
            (None, "targets must be a tensor .*, got NoneType"),
            (torch.eye(12).to_sparse(), "targets must be a tensor .*, got torch.sparse_coo"),
            (([1], [0, 1]), "targets.indices must be int64 of one axis, got list"),
            (torch.ones(1, 12, dtype=torch.complex64), "targets must be real, got torch.complex64"),
        ],
        ids=["list", "none", "coo", "pair of lists", "complex"],
    )
    def test_targets_of_no_known_form(self, targets: Any, message: str) -> None:
        augmentation = QueryAugmentation(random_queries=3)
        with pytest.raises(TypeError, match=f"QueryAugmentation: {message}"):
            augmentation.extend(targets, 12)
        if targets is not None:
            head = make(12, 4, augmentation=augmentation)
            with pytest.raises(TypeError, match=message):
                head(torch.randn(1, 5, D), targets)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
    def test_dense_targets_keep_a_floating_dtype(self, dtype: torch.dtype) -> None:
        y = torch.eye(2, 12).to(dtype)
        made = QueryAugmentation(random_queries=3, target=0.5).extend(y, 12)
        assert isinstance(made, Tensor)
        assert made.dtype == (dtype if dtype.is_floating_point else torch.float32)
        assert torch.equal(made, F.pad(y.to(made.dtype), (0, 3), value=0.5))

    @every_kind
    @pytest.mark.parametrize("sparse", [False, True])
    def test_loss_in_the_head_is_that_of_all_columns(self, groups: int | None, sparse: bool) -> None:
        """With weights of classes and unknown labels, which the random queries have none of."""
        head = make(12, groups, augmentation=QueryAugmentation(noise=0.2, random_queries=4)).double()
        head.loss.register_buffer("class_weight", None)
        options = head.loss.options()
        head.loss.options = lambda: {**options, "class_weight": torch.linspace(1, 2, 12).double()}  # type: ignore
        x, y = torch.randn(3, 5, D).double(), torch.zeros(3, 12).double()
        y[0, 2] = y[1, 11] = 1
        unknown = torch.zeros(3, 12, dtype=torch.bool)
        unknown[2, 3] = True
        torch.manual_seed(5)
        logits = head(x)
        assert logits.shape == (3, 16)
        weight = torch.cat([torch.linspace(1, 2, 12), torch.ones(4)]).double()
        terms = F.binary_cross_entropy_with_logits(logits, F.pad(y, (0, 4), value=1.0), reduction="none") * weight
        expected = terms.masked_fill(F.pad(unknown, (0, 4)), 0.0).mean()
        torch.manual_seed(5)
        targets: Any = SparseTargets.from_dense(y) if sparse else y
        ignore: Any = SparseTargets.from_dense(unknown.float()) if sparse else unknown
        torch.testing.assert_close(head(x, targets, ignore=ignore), expected, check_dtype=False)
        head.eval()
        assert head(x).shape == (3, 12)
        assert torch.equal(head(x), head(x, word_vectors=head.bank()))

    def test_noise_is_on_the_queries_alone(self) -> None:
        """In group decoding the vectors that the last layer takes have none."""
        head = make(12, 3, augmentation=QueryAugmentation(noise=0.5))
        found = head._classes(None, augment=True)
        assert torch.equal(found.vectors[:12], head.bank())
        assert not torch.equal(found.queries[:12], head.bank())

    def test_errors(self) -> None:
        for options, message in (
            ({"noise": -1.0}, "noise must be at least 0 and finite, got -1.0"),
            ({"noise": math.nan}, "noise must be at least 0 and finite, got nan"),
            ({"random_queries": -1}, "random_queries must be at least 0, got -1"),
            ({"distribution": "cauchy"}, "distribution must be one of 'normal', 'uniform', 'shuffled', got 'cauchy'"),
            ({"target": 2.0}, r"target must be in \[0, 1\], got 2.0"),
        ):
            with pytest.raises(ValueError, match=f"QueryAugmentation: {message}"):
                QueryAugmentation(**options)  # type: ignore[arg-type]
        for options, message in (
            ({"noise": "0.1"}, "noise must be a number, got str"),
            ({"noise": None}, "noise must be a number, got NoneType"),
            ({"random_queries": 1.5}, "random_queries must be an integer, got float"),
            ({"random_queries": True}, "random_queries must be an integer, got bool"),
            ({"target": "1"}, "target must be a number, got str"),
        ):
            with pytest.raises(TypeError, match=f"QueryAugmentation: {message}"):
                QueryAugmentation(**options)  # type: ignore[arg-type]


def test_prior_and_bias() -> None:
    head = make(12, 4, prior=0.01)
    assert head.duplicate_pooling_bias.item() == pytest.approx(math.log(0.01 / 0.99), rel=1e-5)
    head.set_prior(torch.linspace(0.1, 0.3, 12))
    assert head.duplicate_pooling_bias.item() == pytest.approx(math.log(0.2 / 0.8), rel=1e-5)
    for wrong in (torch.linspace(-0.5, 1, 12), torch.full((12,), math.nan)):
        with pytest.raises(ValueError, match=r"ZeroShotMLDecoder: prior must be in \[0, 1\] and not NaN, got"):
            head.set_prior(wrong)
    with pytest.raises(ValueError, match=r"prior must be \(C,\) = \(12,\)"):
        head.set_prior(torch.ones(5))


def test_uses_the_ops() -> None:
    head, labels = make(12, 4), SparseTargets.from_lists([[1], [2]], 12)
    with record_backends() as used:
        head(torch.randn(2, 5, D), labels)
        head(torch.randn(2, 5, D))
    assert {"query_attention", "group_fc", "group_fc_loss"} <= set(used)


def test_an_empty_batch() -> None:
    for groups in KINDS.values():
        head = make(12, groups)
        assert head(torch.randn(0, 5, D)).shape == (0, 12)
        assert head(torch.randn(0, 5, D), torch.zeros(0, 12)).item() == 0.0
        assert head.topk(torch.randn(0, 5, D), 3)[0].shape == (0, 3)


def test_mistakes_are_named() -> None:
    words = torch.randn(12, W)
    for options, message in (
        ({"word_vectors": torch.randn(11, W)}, r"word_vectors must be \(C, W\) with C = 12 in the first bank"),
        ({"word_vectors": torch.randn(12)}, r"word_vectors\['train'\] must be"),
        ({"word_vectors": {"a": words, "b": torch.randn(3, 4)}}, r"word_vectors must be of one width W in all banks"),
        ({"word_dim": 300}, r"word_vectors must be \(C, W\) with W = word_dim = 300, got W = 9"),
        ({"word_vectors": None, "word_dim": 0}, r"word_dim must be at least 1, got 0"),
        ({"word_vectors": {"a b": words}}, r"name must be an identifier that names a bank, as 'train', got 'a b'"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"query_step": 0}, "query_step must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"ZeroShotMLDecoder: {message}"):
            ZeroShotMLDecoder(D, 12, **{"word_vectors": words, **SMALL, **options})
    with pytest.raises(ValueError, match="groups must be at least 7, for at most embed_dim = 16 classes each, got 6"):
        ZeroShotMLDecoder(D, 100, groups=6, **SMALL)
    head = make(12)
    with pytest.raises(ValueError, match=r"name must be the name of a bank \('train'\), got 'union'"):
        head.use("union")
    for bad in (torch.randn(3, W + 1), torch.randn(0, W), torch.randn(W)):
        with pytest.raises(ValueError, match=r"word_vectors must be \(C, W\) with W = 9 and C > 0"):
            head(torch.randn(2, 5, D), word_vectors=bad)
    with pytest.raises(TypeError, match="word_vectors must be"):
        head(torch.randn(2, 5, D), word_vectors=[[1.0] * W])
    with pytest.raises(TypeError, match="word_vectors must be"):
        head(torch.randn(2, 5, D), word_vectors=torch.zeros(3, W, dtype=torch.int64))


def test_the_page_runs() -> None:
    """The first Python of docs/zero_shot.md."""
    page = (Path(__file__).parent.parent / "docs/zero_shot.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["logits"].shape == (2, 1006)
    assert names["classes"].shape == (2, 5)
