"""attach_head: one small timm architecture of every kind, models that are not timm's, and what is inherited."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import _timm_rules
from mlhead.backbones import HeadedModel, attach_head, unused_parameters
from mlhead.heads import HEADS, CSRAHead, GAPHead, MLDecoder

timm = pytest.importorskip("timm", reason="timm is not installed")

C = 7
SMALL = {"embed_dim": 64, "num_heads": 4, "feedforward_dim": 64}

# name -> whether timm's own average-pooled pre-logits are the mean of the positions, then the norm
KINDS = {
    "test_resnet": True,
    "test_efficientnet": True,
    "test_byobnet": True,
    "test_nfnet": True,
    "dla46x_c": True,
    "test_convnext": True,
    "caformer_s18": True,
    "mobilenetv3_small_050": False,
    "hgnetv2_b0": False,
    "lowformer_b0": False,
    "efficientvit_b0": False,
    "inception_next_atto": False,
    "resnet50_clip": False,
    "test_mambaout": False,
    "swin_tiny_patch4_window7_224": True,
    "test_vit": False,
    "test_vit2": True,
    "test_vit3": False,
    "vit_tiny_patch16_dinov3_qkvb": True,
    "hiera_tiny_224": True,
    "deit_tiny_distilled_patch16_224": False,
    "levit_128s": True,
    "repvit_m0_9": True,
    "volo_d1_224": False,
    "pit_ti_distilled_224": False,
    "coat_tiny": False,
    "crossvit_tiny_240": False,
    "efficientvim_m1": False,
}
META_ONLY = ("vgg11", "qwen3_vit_88m_enc", "naflexvit_base_patch16_gap", "vit_base_patch16_sapiens2")
# The stated limit: of these, parts of other branches and scales get no gradient.
WITH_UNUSED = ("pit_ti_distilled_224", "coat_tiny", "crossvit_tiny_240", "efficientvim_m1", "qwen3_vit_88m_enc")


def image(model: nn.Module, device: str = "cpu", batch: int = 2) -> Tensor:
    """A batch of the model's own image size."""
    return torch.randn(batch, *model.pretrained_cfg["input_size"], device=device)


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind(name: str) -> None:
    """Evaluation and a training step; where timm averages, our features average to its pre-logits exactly."""
    model = timm.create_model(name).eval()
    x = image(model)
    with torch.no_grad():
        theirs = model.forward_head(model.forward_features(x[:1]), pre_logits=True) if KINDS[name] else None
    headed = attach_head(model, "ml_decoder", C, **SMALL)
    assert headed.backbone is model
    assert not headed.training
    with torch.no_grad():
        features = headed.forward_features(x)
        logits = headed.head(features)
        if theirs is not None:
            raw = _timm_rules.without_prefix(model, _timm_rules.take_features(model, x[:1])[0])
            mean = raw.mean((2, 3), keepdim=True) if raw.ndim == 4 else raw.mean(1)
            native = mean if getattr(model, "output_fmt", None) != "NHWC" else mean.permute(0, 2, 3, 1)
            torch.testing.assert_close(headed.norm(native).flatten(1), theirs)
    positions = features.flatten(2).shape[2] if features.ndim == 4 else features.shape[1]
    assert features.shape[1 if features.ndim == 4 else 2] == headed.num_features == headed.head.in_features
    assert positions > 1
    assert logits.shape == (2, C)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1]), "the image has an influence"

    headed.train()
    F.binary_cross_entropy_with_logits(headed(x), torch.ones(2, C)).backward()
    for parameter_name, parameter in headed.head.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, parameter_name
    assert headed.head.duplicate_pooling.grad.abs().sum() > 0
    without = [n for n, p in headed.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(without) == (name in WITH_UNUSED), without
    assert all(n.startswith("backbone.") for n in without)
    first = next(n for n, p in headed.backbone.named_parameters() if p.requires_grad and p.grad is not None)
    assert headed.backbone.get_parameter(first).grad.abs().sum() > 0, first


@pytest.mark.parametrize("name", META_ONLY)
def test_large_ones_on_meta(name: str) -> None:
    """Shapes, in evaluation and training, and the parameters without a gradient."""
    with torch.device("meta"):
        model = timm.create_model(name)
    headed = attach_head(model, "ml_decoder", C, **SMALL)
    x = image(model, "meta")
    assert headed(x).shape == (2, C)
    assert headed.eval()(x).shape == (2, C)
    assert headed.forward_features(x).shape[1 if headed.forward_features(x).ndim == 4 else 2] == headed.num_features
    assert bool(unused_parameters(headed, x)) == (name in WITH_UNUSED)


def test_average_pooled_vit() -> None:
    """Its norm comes after the pooling, and is applied to every position instead."""
    model = timm.create_model("test_vit", global_pool="avg").eval()
    x = image(model)
    with torch.no_grad():
        theirs = model.forward_head(model.forward_features(x), pre_logits=True)
        norm = model.fc_norm
        headed = attach_head(model, "gap", C)
        assert headed.norm is norm
        tokens = model.forward_features(x)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(norm(tokens.mean(1)), theirs)
        torch.testing.assert_close(headed.forward_features(x), norm(tokens))


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_gap_with_timms_classifier_is_timm(name: str) -> None:
    """The same logits, when the head takes over the classifier's weights (maps NCHW and NHWC)."""
    model = timm.create_model(name).eval()
    x = image(model)
    with torch.no_grad():
        expected = model(x)
        weights = copy.deepcopy(model.get_classifier()).state_dict()
        headed = attach_head(model, "gap", model.num_classes)
        headed.head.fc.load_state_dict(weights)
        torch.testing.assert_close(headed(x), expected)


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str) -> None:
    """By name; logits, maps of attention, and a new number of classes."""
    options: dict[str, Any] = dict(SMALL) if "decoder" in head else {}
    if head == "zero_shot":
        options = {**SMALL, "word_vectors": torch.randn(C, 9)}
    headed = attach_head(timm.create_model("test_resnet"), head, C, **options)
    assert type(headed.head) is HEADS[head]
    assert headed.get_classifier() is headed.head
    x = image(headed)
    assert headed(x).shape == (2, C)
    assert headed.attention_maps(x, [0, 3, 6]).shape == (2, 3, 25)
    headed.reset_classifier(12)
    assert headed.num_classes == 12
    if head == "zero_shot":
        headed.head.set_bank("other", torch.randn(12, 9))
    assert headed(x).shape == (2, 12)


def test_dtype_and_device_are_inherited() -> None:
    """bf16 and meta models get such heads; an explicit dtype wins."""
    model = timm.create_model("test_resnet").bfloat16()
    headed = attach_head(model, "csra", C, num_heads=2)
    assert {p.dtype for p in headed.parameters()} == {torch.bfloat16}
    assert headed(image(headed).bfloat16()).dtype == torch.bfloat16
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    assert next(attach_head(model, "gap", C).head.parameters()).device.type == "meta"
    built = CSRAHead(96, C)
    headed = attach_head(timm.create_model("test_resnet").double(), built, C)
    assert headed.head is built
    assert built.weight.dtype == torch.float64
    headed = attach_head(timm.create_model("test_resnet"), "gap", C, dtype=torch.float64)
    assert headed.head.fc.weight.dtype == torch.float64


def test_head_class_and_module() -> None:
    """A class is called with the width; a module must fit."""
    assert attach_head(timm.create_model("test_resnet"), GAPHead, C, dropout=0.5).head.dropout == 0.5
    model = timm.create_model("test_resnet")
    with pytest.raises(ValueError, match=r"attach_head: head.in_features must be 96, got 64"):
        attach_head(model, GAPHead(64, C), C)
    with pytest.raises(ValueError, match=r"attach_head: head.num_classes must be 7, got 9"):
        attach_head(model, GAPHead(96, 9), C)
    with pytest.raises(ValueError, match="head_options must be empty for a head that is already built"):
        attach_head(model, GAPHead(96, C), C, dropout=0.5)
    with pytest.raises(TypeError, match=r"attach_head: head must be one of 'gap', .* or an nn.Module or its class"):
        attach_head(model, 3, C)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    """Unknown names and wrong options are found before anything is stripped."""
    model = timm.create_model("test_vit2").eval()
    x = image(model)
    expected = model(x)
    message = "attach_head: head must be one of 'gap', 'csra', 'ml_decoder', 'transformer_decoder', 'zero_shot', "
    message += "got 'mldecoder'"
    with pytest.raises(ValueError, match=message):
        attach_head(model, "mldecoder", C)
    with pytest.raises(TypeError, match="unexpected keyword argument 'group'"):
        attach_head(model, "ml_decoder", C, group=5)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        attach_head(model, "gap", 0)
    assert torch.equal(model(x), expected)


def test_unknown_models() -> None:
    """The error says what was looked for and what of it is missing."""
    wanted = (
        r"attach_head: model must be a timm model, or another with forward_features\(x\), .* num_features = D, got "
    )
    with pytest.raises(TypeError, match=wanted + "Linear without forward_features and num_features"):
        attach_head(nn.Linear(3, 4), "gap", C)
    only_features = nn.Linear(3, 4)
    only_features.forward_features = only_features.forward
    with pytest.raises(TypeError, match=wanted + "Linear without num_features"):
        attach_head(only_features, "gap", C)
    with pytest.raises(TypeError, match=r"attach_head: model must be an nn.Module, got str"):
        attach_head("resnet50", "gap", C)
    headed = attach_head(timm.create_model("test_resnet"), "gap", C)
    with pytest.raises(ValueError, match="model must be a model without a head of ours"):
        attach_head(headed, "gap", C)


class Duck(nn.Module):
    """Not timm's, but of its manner."""

    def __init__(self, shape: tuple[int, ...], width: int, **attributes: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shape, self.num_features = shape, width
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward_features(self, x: Tensor) -> Any:
        """Features that depend on the image."""
        return self.scale * torch.arange(float(torch.Size(self.shape).numel())).reshape(self.shape) + x.mean()


def test_models_by_duck_typing() -> None:
    """Maps, NHWC by declaration only (here height, width and D are all equal), tokens with prefix; other outputs."""
    x = torch.randn(2, 3, 8, 8)
    plain = Duck((2, 4, 4, 4), 4)
    assert torch.equal(attach_head(plain, "gap", C).forward_features(x), plain.forward_features(x))
    declared = Duck((2, 4, 4, 4), 4, output_fmt="NHWC")
    features = attach_head(declared, "gap", C).forward_features(x)
    assert torch.equal(features, declared.forward_features(x).permute(0, 3, 1, 2))
    assert features.is_contiguous(memory_format=torch.channels_last)
    prefixed = Duck((2, 6, 4), 4, num_prefix_tokens=2)
    headed = attach_head(prefixed, MLDecoder, C, **SMALL)
    assert torch.equal(headed.forward_features(x), prefixed.forward_features(x)[:, 2:])
    headed(x).sum().backward()
    assert prefixed.scale.grad is not None
    with pytest.raises(ValueError, match=r"what Duck.forward_features gives must be maps .* got \(2, 4\)"):
        attach_head(Duck((2, 4), 4), "gap", C)(x)


def test_a_classifier_of_another_manner_is_reset() -> None:
    """reset_classifier is called with what it takes, and without pooling where it refuses to be without."""

    class Old(Duck):
        calls: tuple[Any, ...] = ()

        def reset_classifier(self, num_classes: int) -> None:
            self.calls += (num_classes,)

    class Refusing(Duck):
        calls: tuple[Any, ...] = ()

        def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
            self.calls += ((num_classes, global_pool, reset_other),)
            assert global_pool is None

    old, refusing = Old((2, 4, 4), 4), Refusing((2, 4, 4), 4)
    attach_head(old, "gap", C)
    attach_head(refusing, "gap", C)
    assert old.calls == (0,)
    assert refusing.calls == ((0, "", True), (0, None, True))


def test_naflexvit_patches_with_a_validity_mask() -> None:
    """Patches that do not exist have no influence with a decoder; other heads refuse them."""
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=64, depth=2, num_heads=2).eval()
    headed = attach_head(model, "ml_decoder", C, **SMALL)
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    patches = {
        "patches": torch.randn(1, 12, 3 * 16 * 16),
        "patch_coord": torch.stack([y, x], -1).reshape(1, 12, 2),
        "patch_valid": torch.ones(1, 12, dtype=torch.bool),
    }
    padded = {
        "patches": F.pad(patches["patches"], (0, 0, 0, 4), value=9.0),
        "patch_coord": F.pad(patches["patch_coord"], (0, 0, 0, 4)),
        "patch_valid": F.pad(patches["patch_valid"], (0, 4)),
    }
    with torch.no_grad():
        torch.testing.assert_close(headed(padded), headed(patches), rtol=1e-4, atol=1e-4)
        maps = headed.attention_maps(padded, [0, 1])
    assert maps.shape == (1, 2, 16)
    assert not maps[:, :, 12:].any()
    other = HeadedModel(headed.backbone, headed.norm, GAPHead(64, C), 64)
    with pytest.raises(ValueError, match="head must be one that takes key_mask, for masked patches, got GAPHead"):
        other(padded)
    with pytest.raises(ValueError, match="head must be one that takes key_mask, for masked patches, got GAPHead"):
        other.attention_maps(padded, [0])


def test_training_modes_are_kept() -> None:
    """A frozen batch norm stays frozen."""
    model = timm.create_model("test_resnet")
    model.bn1.eval()
    headed = attach_head(model, "gap", C)
    assert headed.training
    assert headed.head.training
    assert not headed.backbone.bn1.training
    assert not attach_head(timm.create_model("test_resnet").eval(), "gap", C).head.training


def test_timms_tools_work_on_it() -> None:
    """Data configuration, optimizer factory with the parameters not to decay, checkpointing, EMA."""
    from timm.data import resolve_model_data_config
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    headed = attach_head(timm.create_model("test_vit"), "gap", C)
    assert resolve_model_data_config(headed)["input_size"] == (3, 160, 160)
    assert headed.no_weight_decay() >= {"backbone.pos_embed", "backbone.cls_token"}
    optimizer = create_optimizer_v2(headed, opt="adamw", lr=0.1, weight_decay=0.1)
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(headed.backbone.pos_embed) in undecayed
    assert id(headed.head.fc.weight) not in undecayed
    headed.set_grad_checkpointing()
    headed(image(headed)).sum().backward()
    optimizer.step()
    ema = ModelEmaV3(headed, decay=0.5)
    ema.update(headed)
    assert ema.module(image(headed)).shape == (2, C)


def test_state_dict_and_copy() -> None:
    """Names begin with backbone, norm or head; a strict load gives the same logits."""
    headed = attach_head(timm.create_model("test_convnext"), "csra", C).eval()
    other = attach_head(timm.create_model("test_convnext"), "csra", C).eval()
    assert {name.split(".")[0] for name in headed.state_dict()} == {"backbone", "norm", "head"}
    x = image(headed)
    with torch.no_grad():
        assert not torch.allclose(other(x), headed(x))
        other.load_state_dict(headed.state_dict())
        assert torch.equal(other(x), headed(x))
        assert torch.equal(copy.deepcopy(headed)(x), headed(x))


def test_unused_parameters() -> None:
    """Named as in the model; the model's modes and gradients are as before."""
    with torch.device("meta"):
        model = timm.create_model("crossvit_tiny_240")
    headed = attach_head(model, "gap", C)
    headed.backbone.blocks.eval()
    modes = [m.training for m in headed.modules()]
    names = unused_parameters(headed, image(model, "meta"))
    assert "backbone.norm.0.weight" in names
    assert set(names) < {n for n, _ in headed.named_parameters()}
    assert [m.training for m in headed.modules()] == modes
    assert all(p.grad is None for p in headed.parameters())
    headed.backbone.norm[0].weight.requires_grad_(False)
    assert "backbone.norm.0.weight" not in unused_parameters(headed, image(model, "meta"))


def test_another_image_size() -> None:
    """A non-square one, where the backbone accepts it."""
    headed = attach_head(timm.create_model("test_resnet"), "csra", C)
    assert headed(torch.randn(2, 3, 96, 160)).shape == (2, C)
    assert headed.forward_features(torch.randn(2, 3, 96, 160)).shape[2:] == (3, 5)


def test_compiles_without_a_graph_break() -> None:
    """Backbone and head in one graph."""
    torch._dynamo.reset()
    headed = attach_head(timm.create_model("test_resnet"), "ml_decoder", C, **SMALL).eval()
    x = image(headed)
    with torch.no_grad():
        compiled = torch.compile(headed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), headed(x))
