"""The loss in the head: `head(features, targets)` is the loss of `head(features)`, for every head, loss and form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mlhead import SparseTargets, attach_head
from mlhead.heads import CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from mlhead.losses import AsymmetricLoss, BinaryCrossEntropy, SoftmaxCrossEntropy

B, D, C = 3, 12, 7
SMALL = {"embed_dim": 16, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.0}
WORDS = torch.linspace(-1, 1, C * 5).view(C, 5).sin()
MAKERS: dict[str, Callable[..., Head]] = {
    "gap": lambda **o: GAPHead(D, C, **o),
    "gap-plain": lambda **o: GAPHead(D, C, bias=False, **o),
    "csra": lambda **o: CSRAHead(D, C, num_heads=2, bias=True, **o),
    "csra-spatial": lambda **o: CSRAHead(D, C, pooling="spatial", normalize=False, lam=0.3, **o),
    "ml_decoder": lambda **o: MLDecoder(D, C, groups=3, **SMALL, **o),
    "transformer_decoder": lambda **o: TransformerDecoder(D, C, **SMALL, **o),
    "zero_shot": lambda **o: ZeroShotMLDecoder(D, C, word_vectors=WORDS, **SMALL, **o),
    "zero_shot-groups": lambda **o: ZeroShotMLDecoder(D, C, word_vectors=WORDS, groups=3, **SMALL, **o),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "bce": lambda: BinaryCrossEntropy(pos_weight=torch.linspace(0.5, 3, C).double(), label_smoothing=0.1),
    "asl": lambda: AsymmetricLoss(gamma_neg=3.0, gamma_pos=1.0, margin=0.1, eps=1e-6, detach_focal=False),
    "softmax": lambda: SoftmaxCrossEntropy(label_smoothing=0.1, reduction="sum"),
}
every_head = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_loss = pytest.mark.parametrize("make_loss", LOSSES.values(), ids=LOSSES.keys())


def batch() -> tuple[Tensor, Tensor]:
    """Features (B, D, 2, 3) in fp64 that want a gradient, and dense labels, one image without any."""
    y = torch.zeros(B, C, dtype=torch.float64)
    y[0, 2] = y[0, 5] = y[2, 6] = 1
    return torch.randn(B, D, 2, 3, dtype=torch.float64, requires_grad=True), y


def gradients(loss: Tensor, head: Head, x: Tensor) -> list[Tensor]:
    parameters = [p for p in head.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, [x, *parameters]))


@every_head
@every_loss
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_is_the_loss_of_the_logits(
    make: Callable[..., Head], make_loss: Callable[[], nn.Module], sparse: bool, training: bool
) -> None:
    """Value and every gradient, fp64."""
    head = make(loss=make_loss()).double().train(training)
    x, y = batch()
    expected = head.loss(head(x), y)
    targets = SparseTargets.from_dense(y) if sparse else y
    loss = head(x, targets)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    for own, theirs in zip(gradients(loss, head, x), gradients(expected, head, x), strict=True):
        torch.testing.assert_close(own, theirs)
    with torch.no_grad():
        torch.testing.assert_close(head(x, targets), expected.detach())


@every_head
def test_weights_of_images_and_unknown_labels(make: Callable[..., Head]) -> None:
    """sample_weight, and ignore in both forms."""
    head = make().double()
    x, y = batch()
    weight, ignore = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64), torch.zeros(B, C, dtype=torch.bool)
    ignore[0, 1] = ignore[2, 3] = True
    expected = BinaryCrossEntropy()(head(x), y, weight.unsqueeze(1) * ~ignore)
    torch.testing.assert_close(head(x, y, sample_weight=weight, ignore=ignore), expected)
    unknown = SparseTargets.from_dense(ignore)
    torch.testing.assert_close(head(x, SparseTargets.from_dense(y), sample_weight=weight, ignore=unknown), expected)


@every_head
def test_the_loss_is_no_part_of_the_state(make: Callable[..., Head]) -> None:
    """Not of the state dict, nor of the parameters; it moves and is copied with the head, and may be assigned."""
    plain = make()
    head = make(loss=BinaryCrossEntropy(pos_weight=torch.ones(C)))
    assert head.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in head.named_parameters()] == [n for n, _ in plain.named_parameters()]
    plain.load_state_dict(head.state_dict())
    assert copy.deepcopy(head).to("meta").loss.pos_weight.device.type == "meta"
    assert isinstance(plain.loss, BinaryCrossEntropy)
    plain.loss = AsymmetricLoss()
    x, y = batch()
    x, y = x.float(), y.float()
    torch.testing.assert_close(plain(x, y), AsymmetricLoss()(plain(x), y))


def test_mistakes_are_named() -> None:
    x, y = batch()
    head = GAPHead(D, C).double()
    with pytest.raises(ValueError, match="GAPHead: pre_logits must be False with targets"):
        head(x, y, pre_logits=True)
    with pytest.raises(ValueError, match="GAPHead: sample_weight must be None without targets"):
        head(x, sample_weight=torch.ones(B))
    with pytest.raises(ValueError, match="GAPHead: ignore must be None without targets"):
        head(x, ignore=torch.ones(B, C) > 0)
    with pytest.raises(TypeError, match=r"GAPHead: targets must be labels \(pre_logits is a keyword\), got True"):
        head(x, True)
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments"):
        head(x, y, True)
    with pytest.raises(TypeError, match=r"GAPHead: loss must be a module of mlhead\.losses, .*got MSELoss"):
        GAPHead(D, C, loss=nn.MSELoss())
    head.loss = BinaryCrossEntropy(reduction="none")
    with pytest.raises(
        ValueError, match="BinaryCrossEntropy: reduction must be 'mean' or 'sum' for a loss in the head"
    ):
        head(x, y)
    head.loss = nn.Identity()
    with pytest.raises(TypeError, match=r"GAPHead: loss must be .* got Identity\(\)"):
        head(x, y)
    head.loss = SoftmaxCrossEntropy()
    torch.testing.assert_close(
        head(x, torch.tensor([2, 0, 6])), SoftmaxCrossEntropy()(head(x), torch.tensor([2, 0, 6]))
    )


@every_head
def test_autocast(make: Callable[..., Head]) -> None:
    """fp32 parameters, bf16 products, the loss and the gradients in fp32."""
    head = make()
    x, y = (t.detach().float() for t in batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head(x, y), rtol=0.02, atol=0.02)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["gap", "csra", "ml_decoder"])
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    head = MAKERS[name]()
    x, y = (t.detach().float() for t in batch())
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), head(x, y))
    compiled(x, y).backward()
    assert all(p.grad is not None for p in head.parameters() if p.requires_grad)


# A backbone with a head


def labels() -> SparseTargets:
    return SparseTargets.from_lists([[3], [0, 19]], 20)


@pytest.mark.parametrize("head", ["gap", "csra", "ml_decoder", "transformer_decoder"])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_a_model_gives_its_loss(backbone: str, head: str) -> None:
    """Of maps and of tokens: the loss of its logits, and a gradient of the first layer."""
    timm = pytest.importorskip("timm")
    options = {} if head in ("gap", "csra") else {"embed_dim": 16, "num_heads": 2, "feedforward_dim": 16}
    model = attach_head(timm.create_model(backbone), head, 20, **options).eval()
    images, targets = torch.randn(2, 3, 160, 160), labels()
    loss = model(images, targets)
    torch.testing.assert_close(loss, BinaryCrossEntropy()(model(images), targets.to_dense()))
    weight = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(
        model(images, targets.to_dense(), sample_weight=weight),
        BinaryCrossEntropy()(model(images), targets.to_dense(), weight),
    )
    loss.backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0


class Plain(nn.Module):
    """A head from elsewhere, which knows of logits only."""

    in_features, num_classes = 64, 20

    def forward(self, features: Tensor) -> Tensor:
        return features.mean((2, 3))[:, :20]


class Maps(nn.Module):
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_head_from_elsewhere_has_no_loss() -> None:
    model = attach_head(Maps(), Plain(), 20)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 20)
    with pytest.raises(ValueError, match="HeadedModel: head must be one that takes targets, for a loss, got Plain"):
        model(torch.randn(2, 3, 8, 8), labels())


def test_masked_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask reaches a decoder beside the targets."""
    from mlhead import _timm_rules

    mask = torch.tensor([[True] * 36, [True] * 20 + [False] * 16])
    monkeypatch.setattr(_timm_rules, "take_features", lambda model, x: (model.forward_features(x), mask))
    model = attach_head(Maps(), "ml_decoder", 20, **SMALL)
    images = torch.randn(2, 3, 8, 8)
    loss = model(images, labels())
    torch.testing.assert_close(loss, BinaryCrossEntropy()(model(images), labels().to_dense()))
    monkeypatch.undo()
    assert not torch.allclose(loss, model(images, labels()))


def test_under_distributed_data_parallel(tmp_path: Path) -> None:
    """The loss is the forward of one module, which is what DDP reduces gradients of."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = attach_head(Maps(), "gap", 20)
        parallel = nn.parallel.DistributedDataParallel(model)
        images = torch.randn(2, 3, 8, 8)
        for targets in (labels(), labels().to_dense()):
            model.zero_grad()
            loss = parallel(images, targets)
            loss.backward()
            expected = torch.autograd.grad(
                model.head.loss(model(images), labels().to_dense()), list(model.parameters())
            )
            for parameter, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()
