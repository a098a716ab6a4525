"""How the features of each timm architecture are taken: five rules, by attribute and by class name.

timm itself is not imported: a model is recognised by the names of its classes.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from . import _check

# These return a list, or prefix tokens among pooled ones; their last intermediate map is what a head wants. For other
# models it is not: it misses the last convolution of EfficientNet, RexNet, GhostNet, HRNet, FastViT and others.
INTERMEDIATES = ("CoaT", "CrossVit", "EfficientViM", "PoolingVisionTransformer")

# Their `norm` comes after the pooling. Elsewhere a `norm` is part of forward_features.
NORM_AFTER_POOL = ("Qwen3VitClassifier", "DeepseekVitClassifier", "Gemma4VitClassifier")

# Layers between the pooling and the classifier that forward_features does not reach; without a gradient they would
# only make DDP wait. EfficientNet's conv_head comes before the pooling and stays.
DEAD_LAYERS = {
    "MobileNetV3": ("conv_head", "norm_head"),
    "GhostNet": ("conv_head",),
    "RepGhostNet": ("conv_head",),
    "FasterNet": ("conv_head",),
    "LCNetV2": ("conv_head",),
    "VGG": ("pre_logits",),
}
ATTENTION_POOLS = ("AttentionPool2d", "RotAttentionPool2d")


def is_any(module: Any, names: tuple[str, ...]) -> bool:
    """Whether the module's class, or a class it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def check_model(where: str, model: Any) -> None:
    """A module with the two things that are looked for."""
    if not isinstance(model, nn.Module):
        _check.fail(where, "model", "an nn.Module", type(model).__name__, TypeError)
    if hasattr(model, "_orig_mod"):
        must = "an uncompiled model, whose layers can be told apart: torch.compile what comes out"
        _check.fail(where, "model", must, f"a {type(model).__name__}", TypeError)
    missing = []
    if not callable(getattr(model, "forward_features", None)):
        missing.append("forward_features")
    if not _is_width(getattr(model, "num_features", None)):
        missing.append("num_features")
    if missing:
        must = (
            "a timm model, or another with forward_features(x), giving maps (B, D, H, W) or tokens (B, L, D), and the "
            "integer num_features = D"
        )
        _check.fail(where, "model", must, f"{type(model).__name__} without {' and '.join(missing)}", TypeError)


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def feature_width(model: Any) -> int:
    """D, the width of what `take_features` gives (rule 1)."""
    if is_any(model, INTERMEDIATES):
        return int(model.feature_info[-1]["num_chs"])
    return int(model.num_features)


def take_norm(model: Any, width: int) -> nn.Module:
    """Takes the norm between pooling and classifier off the model (rule 2); Identity where there is none."""
    if is_any(model, NORM_AFTER_POOL):
        return _take(model, "norm")
    fc_norm = getattr(model, "fc_norm", None)
    if isinstance(fc_norm, nn.Module) and not isinstance(fc_norm, nn.Identity):
        return _take(model, "fc_norm")
    head = getattr(model, "head", None)
    norm = getattr(head, "norm", None)
    # MetaNeXt's head.norm follows a layer of its head, and has another width.
    if isinstance(norm, nn.Module) and _norm_width(norm) == width:
        return _take(head, "norm")
    return nn.Identity()


def _take(module: Any, name: str) -> nn.Module:
    taken = getattr(module, name)
    setattr(module, name, nn.Identity())
    return taken


def _norm_width(norm: nn.Module) -> int | None:
    shape = getattr(norm, "normalized_shape", None)
    width = shape[-1] if shape else getattr(norm, "num_features", None)
    return width if _is_width(width) else None


def strip(model: Any) -> None:
    """Takes the classifier (rule 3) and the layers that only it used (rule 4) off the model."""
    reset = getattr(model, "reset_classifier", None)
    if reset is not None:
        known = inspect.signature(reset).parameters
        options = {"reset_other": True} if "reset_other" in known else {}
        unpooled = {"global_pool": ""} if "global_pool" in known else {}
        try:
            reset(0, **unpooled, **options)
        except AssertionError:  # this model cannot do without its pooling, which forward_features does not reach
            reset(0, **options)
    for name, layers in DEAD_LAYERS.items():
        if is_any(model, (name,)):
            for layer in layers:
                setattr(model, layer, nn.Identity())
    if is_any(model, ("ByobNet",)) and is_any(model.head, ATTENTION_POOLS):
        model.head = nn.Identity()


def take_features(model: Any, x: Any) -> tuple[Tensor, Tensor | None]:
    """The features in the model's own layout (rule 1), and a mask (B, L) of the valid positions or None."""
    if is_any(model, INTERMEDIATES):
        options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return model.forward_intermediates(x, **options)[-1], None
    # NaFlexViT takes patches, coordinates and validity as a dictionary, and gives one back.
    features = model.forward_features(**x) if isinstance(x, dict) else model.forward_features(x)
    if isinstance(features, dict) and "patches" in features:
        return features["patches"], features.get("patch_valid")
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        must = "maps (B, D, H, W) or tokens (B, L, D)"
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        _check.fail("attach_head", f"what {type(model).__name__}.forward_features gives", must, got)
    return features, None


def without_prefix(model: Any, features: Tensor) -> Tensor:
    """Maps (B, D, H, W) or tokens (B, L, D) without prefix tokens, all of them views (rule 5)."""
    if features.ndim == 4:
        # Only the declaration tells: in some ViTs the number of tokens equals the width.
        return features.permute(0, 3, 1, 2) if getattr(model, "output_fmt", None) == "NHWC" else features
    prefix = getattr(model, "num_prefix_tokens", None)
    if is_any(model, ("VOLO",)):
        prefix = int(getattr(model, "cls_token", None) is not None)
    return features[:, prefix:] if prefix else features
