"""What surrounds csra_pool: Fig. 1 on trained models, the ablations of the paper, attention maps, and the edges."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlhead import CSRAHead, GAPHead, attach_head, csra_attention, csra_pool, plain_max_score, visualize, with_max_score
from mlhead.heads.max_score import NormOfMean, fixed_lam

D, C = 12, 7
F64 = torch.float64
INF = math.inf


def scores_of(linear: nn.Linear | nn.Conv2d, maps: Tensor) -> Tensor:
    """(B, C, L)"""
    return F.conv2d(maps, linear.weight.reshape(*linear.weight.shape[:2], 1, 1), linear.bias).flatten(2)


# Fig. 1 on a classifier


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_plain_max_score_is_figure_1(conv: bool, bias: bool) -> None:
    """y_avg + lam * y_max of maps and tokens, with gradients to the classifier."""
    linear = (nn.Conv2d(D, C, 1, bias=bias) if conv else nn.Linear(D, C, bias=bias)).double()
    maps = torch.randn(3, D, 2, 5, dtype=F64, requires_grad=True)
    scores = scores_of(linear, maps)
    expected = scores.mean(2) + 0.3 * scores.amax(2)
    got = plain_max_score(linear, maps, 0.3)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(plain_max_score(linear, maps.flatten(2).transpose(1, 2), 0.3), expected)
    upstream = torch.randn(3, C, dtype=F64)
    wanted = [maps, *linear.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(expected, wanted, upstream)
    )


def test_plain_max_score_needs_to_know_the_model() -> None:
    """Table 1 has one lam for ResNets and another for the rest, which a classifier does not tell."""
    linear, maps = nn.Linear(D, C), torch.randn(2, D, 3, 3)
    message = r"plain_max_score: lam must be given for a classifier alone.* 0.02 for ResNets and 0.2 for all other"
    with pytest.raises(ValueError, match=message):
        plain_max_score(linear, maps)
    with pytest.raises(ValueError, match=message):
        plain_max_score(GAPHead(D, C), maps)
    gap = GAPHead(D, C)
    torch.testing.assert_close(plain_max_score(gap, maps, 0.1), plain_max_score(gap.fc, maps, 0.1))
    with pytest.raises(
        ValueError, match=r"features must be maps \(B, 12, H, W\) or tokens \(B, L, 12\), got \(2, 3, 3, 12\)"
    ):
        plain_max_score(linear, maps.permute(0, 2, 3, 1), 0.1)
    with pytest.raises(ValueError, match="lam must be finite"):
        plain_max_score(linear, maps, INF)


@pytest.mark.parametrize(
    ("classifier", "got"),
    [
        (nn.Identity(), "got Identity"),
        (nn.Conv2d(D, C, 3), r"got Conv2d \(7, 12, 3, 3\)"),
        (nn.Conv2d(D, 4, 1, groups=2), r"got Conv2d \(4, 6, 1, 1\)"),
        (nn.Sequential(nn.Linear(D, C)), "got Sequential"),
    ],
    ids=["identity", "conv3", "groups", "sequential"],
)
def test_what_is_no_linear_classifier(classifier: nn.Module, got: str) -> None:
    with pytest.raises(TypeError, match=f"model_or_classifier must be an nn.Linear or a 1x1 nn.Conv2d.*{got}"):
        plain_max_score(classifier, torch.randn(2, D, 3, 3), 0.1)
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear or a 1x1 nn.Conv2d"):
        CSRAHead.from_linear(classifier, lam=0.1)


# Fig. 1 on a model

AVERAGING: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_efficientnet": {},
    "dla46_c": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24},
    "test_vit": {"global_pool": "avg"},
    "test_vit2": {},
}


def timm_model(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """An architecture of timm, with norms and biases of influence, and images."""
    model = pytest.importorskip("timm").create_model(name, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        model.get_classifier().bias.normal_()
    size = model.pretrained_cfg["input_size"][1:] if hasattr(model, "patch_embed") else (64, 96)
    return model, torch.randn(2, 3, *size)


@pytest.mark.parametrize("name", AVERAGING)
def test_with_max_score_starts_from_the_models_own_prediction(name: str) -> None:
    """With lam = 0 the untouched model, lam adds the maximum; the classifier's weights are the same."""
    model, x = timm_model(name, **AVERAGING[name])
    original = copy.deepcopy(model)
    classifier = original.get_classifier()
    with torch.no_grad():
        expected = original(x)
        headed = with_max_score(model, 0.0)
        assert not headed.training
        torch.testing.assert_close(headed(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert torch.equal(headed.head.weight[0], classifier.weight.flatten(1))
        assert torch.equal(headed.head.bias[0], classifier.bias)
        before = original.state_dict()
        assert all(torch.equal(value, before[n]) for n, value in headed.backbone.state_dict().items())

        default = with_max_score(copy.deepcopy(original))
        lam = 0.02 if name == "test_resnet" else 0.2
        assert default.head.lam == lam
        features = headed.forward_features(x)
        largest = (features.flatten(2).transpose(1, 2) if features.ndim == 4 else features) @ headed.head.weight[0].T
        largest = (largest + headed.head.bias[0]).amax(1)
        torch.testing.assert_close(default(x), expected + lam * largest, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(default(x), plain_max_score(original, features), rtol=1e-4, atol=1e-3)
        maps = headed.attention_maps(x, [0, 3])
    assert maps.shape[:2] == (2, 2)
    torch.testing.assert_close(maps.sum(2), torch.ones(2, 2))


def test_fixed_lam_is_table_1() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        for name in ("resnet50", "resnext50_32x4d", "seresnet50", "res2net50_26w_4s", "resnest50d", "resnetv2_50"):
            assert fixed_lam(timm.create_model(name)) == 0.02, name
        for name in ("mobilenetv2_100", "efficientnet_b3", "vit_base_patch16_224", "convnext_tiny", "densenet121"):
            assert fixed_lam(timm.create_model(name)) == 0.2, name
        headed = with_max_score(timm.create_model("resnet50"))
    assert headed.head.lam == 0.02
    assert headed(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(("name", "options"), [("test_vit", {}), ("test_resnet", {"global_pool": "max"})])
def test_models_that_pool_otherwise_must_be_asked_for(name: str, options: dict[str, Any]) -> None:
    """As the paper does with ViT: no class token, the average of the patches through the model's own norm."""
    model, x = timm_model(name, **options)
    original = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"with_max_score: model must be one that averages its positions, or replace_pooling=True"
    ):
        with_max_score(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=0, msg="a refused model is not changed")
        headed = with_max_score(model, 0.0, replace_pooling=True)
        features = original.forward_features(x)
        average = features[:, original.num_prefix_tokens :].mean(1) if features.ndim == 3 else features.mean((2, 3))
        torch.testing.assert_close(headed(x), original.get_classifier()(average), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(headed(x), original(x), rtol=1e-2), "not the model's own prediction, as documented"


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "mobilenetv3_small_050",
            {},
            ValueError,
            "got MobileNetV3, with 288 features and 1024 inputs of the classifier",
        ),
        ("test_vit3", {}, ValueError, "directly after the pooling, got VisionTransformer, which has other layers"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, TypeError, "got a tuple of 2 .*distilled"),
        ("test_resnet", {"num_classes": 0}, TypeError, "got Identity .*num_classes=0.* as the classifier of ResNet"),
    ],
)
def test_models_without_scores_of_positions(name: str, options: dict, error: type[Exception], message: str) -> None:
    model = pytest.importorskip("timm").create_model(name, **options)
    before, training = list(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error, match=f"with_max_score: model must be .*{message}"):
        with_max_score(model, replace_pooling=True)
    assert list(model.state_dict()) == before
    assert [module.training for module in model.modules()] == training


def test_unknown_models_get_the_error_of_attach_head() -> None:
    with pytest.raises(TypeError, match=r"with_max_score: model must be a timm model.*Linear without forward_features"):
        with_max_score(nn.Linear(D, C))
    timm = pytest.importorskip("timm")
    headed = attach_head(timm.create_model("test_resnet"), "csra", C)
    with pytest.raises(TypeError, match="with_max_score: model must be one with a linear classifier, got a CSRAHead"):
        with_max_score(headed)


def test_a_gap_head_of_ours() -> None:
    """What `mlhead train --head gap` trains."""
    model, x = timm_model("test_convnext")
    gap = attach_head(model, "gap", C).eval()
    with torch.no_grad():
        expected = gap(x)
        torch.testing.assert_close(with_max_score(gap, 0.0)(x), expected)
        assert with_max_score(gap).head.lam == 0.2
        got = with_max_score(gap)(x)
        torch.testing.assert_close(got, plain_max_score(gap, gap.forward_features(x)))


@pytest.mark.parametrize("shape", [(2, D, 3, 4), (2, 6, D)])
def test_norm_of_mean(shape: tuple[int, ...]) -> None:
    """The mean of the normed positions is the norm of their mean, for LayerNorm and RMSNorm."""
    x = torch.randn(shape, dtype=F64) + 1
    mean = x.mean((2, 3)) if x.ndim == 4 else x.mean(1)
    for norm in (
        nn.LayerNorm(D),
        nn.LayerNorm(D, bias=False),
        nn.RMSNorm(D),
        nn.LayerNorm(D, elementwise_affine=False),
    ):
        norm = norm.double()
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        y = NormOfMean(norm)(x)
        torch.testing.assert_close(y.mean((2, 3)) if x.ndim == 4 else y.mean(1), norm(mean))
    half = NormOfMean(nn.LayerNorm(D).bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), NormOfMean(nn.LayerNorm(D).double())(x), rtol=3e-2, atol=3e-2)


# The ablations of Tables 6 and 8


def by_hand(head: CSRAHead, maps: Tensor) -> Tensor:
    """The head's logits, head by head."""
    lams = head.lam if isinstance(head.lam, tuple) else (head.lam,) * head.num_heads
    logits = maps.new_zeros(maps.shape[0], head.num_classes)
    for h, (T, lam) in enumerate(zip(head.temperatures, lams, strict=True)):
        weight = F.normalize(head.weight[h], dim=1) if head.normalize else head.weight[h]
        s = F.conv2d(maps, weight[:, :, None, None], None if head.bias is None else head.bias[h]).flatten(2)
        attended = s.amax(2) if T == INF else (s * F.softmax(T * s, 2)).sum(2)
        if head.pooling != "spatial":
            logits = logits + s.mean(2)
        if head.pooling != "average":
            logits = logits + lam * attended
    return logits


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("lam", [0.4, (0.1, 0.7, 0.0)], ids=["one", "per-head"])
@pytest.mark.parametrize("pooling", ["both", "average", "spatial"])
def test_ablations(pooling: str, lam: Any, normalize: bool) -> None:
    """One term or both, lam per head, any temperatures; the prior follows the weight of the bias."""
    options = {"temperatures": (0.3, 40.0, INF), "lam": lam, "normalize": normalize, "pooling": pooling, "bias": True}
    head = CSRAHead(D, C, prior=0.03, dtype=F64, **options)
    torch.testing.assert_close(head(torch.zeros(2, 3, D, dtype=F64)).sigmoid(), torch.full((2, C), 0.03, dtype=F64))
    nn.init.normal_(head.bias)
    maps = torch.randn(3, D, 2, 5, dtype=F64, requires_grad=True)
    got, expected = head(maps), by_hand(head, maps)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn(3, C, dtype=F64)
    wanted = [maps, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(expected, wanted, upstream)
    )
    assert f"pooling={pooling!r}" in repr(head)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {"weight": (3, C, D), "bias": (3, C)}


def test_ablations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="CSRAHead: pooling must be one of 'both', 'average', 'spatial', got 'max'"):
        CSRAHead(D, C, pooling="max")
    with pytest.raises(ValueError, match="CSRAHead: lam must be finite"):
        CSRAHead(D, C, num_heads=2, lam=(0.1, INF))
    with pytest.raises(ValueError, match=r"lam must be other than 0 for pooling='spatial'"):
        CSRAHead(D, C, pooling="spatial", lam=0.0)
    with pytest.raises(ValueError, match=r"lam must be such that a bias counts in the logits, for a prior, got -1.0"):
        CSRAHead(D, C, lam=-1.0, bias=True, prior=0.1)


def test_ablations_as_options_of_a_run() -> None:
    from mlhead._config import TrainConfig
    from mlhead._usage import UsageError
    from mlhead.building import build_model

    def run(value: str) -> TrainConfig:
        return TrainConfig(backbone="small", head="csra", head_opt={"pooling": value, "lam": 0.4})

    assert build_model(run("spatial"), C, 1).head.pooling == "spatial"
    with pytest.raises(UsageError, match="--head csra on --backbone small: CSRAHead: pooling must be one of"):
        build_model(run("max"), C, 1)


# Attention maps


@pytest.mark.parametrize("normalize", [True, False])
def test_attention_of_classes_per_image(normalize: bool) -> None:
    """(B, K) is each image with its own (K,); none, and an empty batch, give empty maps."""
    head = CSRAHead(D, C, temperatures=(2.0, INF), normalize=normalize)
    maps = torch.randn(3, D, 2, 5)
    classes = torch.tensor([[0, 6], [3, 3], [5, 1]])
    got = head.attention_maps(maps, classes)
    one_by_one = torch.cat([head.attention_maps(maps[i : i + 1], row) for i, row in enumerate(classes)])
    torch.testing.assert_close(got, one_by_one)
    torch.testing.assert_close(got.sum(2), torch.ones(3, 2))
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(head.attention_maps(tokens, classes), got)
    assert head.attention_maps(maps[:0], classes[:0]).shape == (0, 2, 10)
    assert head.attention_maps(maps, classes[:, :0]).shape == (3, 0, 10)
    per_head = csra_attention(maps, head.weight, classes, temperatures=(2.0, INF), normalize=normalize)
    assert per_head.shape == (3, 2, 2, 10)
    assert ((per_head[:, 1] == 0) | (per_head[:, 1] == 1)).all()
    with pytest.raises(
        ValueError, match=r"csra_attention: classes must be \(K,\) or \(B, K\) with B = 3, got \(2, 2\)"
    ):
        csra_attention(maps, head.weight, classes[:2], temperatures=(2.0, INF))


@pytest.mark.parametrize("pooling", ["both", "average"])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_maps_over_an_image_that_is_not_square(as_tokens: bool, pooling: str, tmp_path: Path) -> None:
    """The heat lies where the class's feature is; rows of wide pictures stand close."""
    head = CSRAHead(2, 2, temperatures=(1.0, INF), normalize=False, pooling=pooling)
    with torch.no_grad():
        head.weight.copy_(4 * torch.eye(2).expand(2, 2, 2))
    maps = torch.zeros(1, 2, 6, 10)
    maps[0, 0, 1, 8] = maps[0, 1, 4, 2] = 3.0
    features = maps.flatten(2).transpose(1, 2) if as_tokens else maps
    heats = visualize.heat_maps(head.attention_maps(features, [0, 1])[0], features, 60, 100)
    places = [np.unravel_index(heat.argmax(), heat.shape) for heat in heats]
    assert [(int(y) // 10, int(x) // 10) for y, x in places] == [(1, 8), (4, 2)]
    pytest.importorskip("matplotlib")
    picture = np.full((60, 100, 3), 90, np.uint8)
    rows = [[visualize.Panel(picture, f"{i}", heat) for heat in heats] for i in range(3)]
    visualize.panel_grid(rows, tmp_path / "wide.png")
    with pytest.importorskip("PIL.Image").open(tmp_path / "wide.png") as image:
        width, height = image.size
    assert 1.75 * 130 * 3 * 0.6 < height < 1.3 * 1.75 * 130 * 3 * 0.6, (width, height)


# Edges


@pytest.mark.parametrize("temperatures", [(1.0,), (3.0, INF)])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_class_of_zero_weight(normalize: bool, temperatures: tuple[float, ...]) -> None:
    """Logit 0 and finite gradients, for one class and for all."""
    for rows in ([2], range(C)):
        head = CSRAHead(D, C, temperatures=temperatures, normalize=normalize)
        with torch.no_grad():
            head.weight[:, rows] = 0
        maps = torch.randn(2, D, 2, 3, requires_grad=True)
        logits = head(maps)
        assert (logits[:, rows] == 0).all()
        logits.sum().backward()
        assert head.weight.grad.isfinite().all()
        assert maps.grad.isfinite().all()


def test_one_position() -> None:
    """All poolings agree: (average + lam) times the score."""
    x = torch.randn(3, D, 1, 1, dtype=F64)
    head = CSRAHead(D, C, temperatures=(1.0, INF), lam=(0.2, 0.5), normalize=False, dtype=F64)
    expected = x[:, :, 0, 0] @ (1.2 * head.weight[0] + 1.5 * head.weight[1]).T
    torch.testing.assert_close(head(x), expected)
    assert (head.attention_maps(x, [0, 1]) == 1).all()


class Recorder(TorchDispatchMode):
    """The first tensor of every call of the op, and the operators that made anything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.before: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mlhead.csra_pool.default:
            self.inputs.append(args[0])
        elif not self.inputs:
            self.before.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tokens", "strided"])
def test_features_reach_the_op_without_a_copy(layout: str) -> None:
    """Maps of any strides become tokens by views, for the head and for Fig. 1."""
    x = torch.randn(2, D, 3, 5)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "tokens":
        x = torch.randn(2, 15, D)
    elif layout == "strided":
        x = torch.randn(2, 2 * D, 3, 5)[:, ::2]
    head, linear = CSRAHead(D, C, num_heads=2), nn.Linear(D, C)
    for call in (
        lambda: head(x),
        lambda: plain_max_score(linear, x, 0.2),
        lambda: csra_pool(x, head.weight, temperatures=(1, 2), lam=1),
    ):
        with Recorder() as recorder, torch.no_grad():
            call()
        (seen,) = recorder.inputs
        assert seen.shape == (2, 15, D)
        assert seen.data_ptr() == x.data_ptr()
        views = ("aten.view", "aten.transpose", "aten.alias", "aten.select", "aten.unsqueeze")
        assert all(name.startswith(views) for name in recorder.before), recorder.before
