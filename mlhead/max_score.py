"""CSRA's largest score on a trained model, without training: `with_max_score`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, _timm_rules
from .backbones import HeadedModel
from .heads import CSRAHead, GAPHead
from .heads.max_score import NormOfMean, fixed_lam, linear_classifier


class MaxScoreModel(HeadedModel):
    """A trained model whose classifier adds its largest score to its average. Made by `with_max_score`."""

    def _features(self, x: Any) -> tuple[Tensor, Tensor | None]:
        features, mask = _timm_rules.take_features(self.backbone, x)
        return self.norm(_timm_rules.without_prefix(self.backbone, features)), mask


def with_max_score(model: nn.Module, lam: float | None = None, *, replace_pooling: bool = False) -> HeadedModel:
    """Adds to the logits of a trained model lam times each class's largest score, without any training.

    logits = y_avg + lam * y_max: the average of the classifier's scores over the positions, which is the model's own
    prediction, and their maximum.

    Args:
        model: A timm model with its classifier, or what `attach_head(..., "gap", ...)` gives. It is taken over, as by
            `attach_head`; its classifier's weights are copied into a CSRAHead unchanged.
        lam: The weight of the largest score. By default CSRA's fixed value: 0.02 for ResNets (timm's ResNet and
            ResNetV2, with all that derive from them), 0.2 for all other models. `model.head.lam` has it afterwards.
        replace_pooling: Whether a model that pools otherwise may be used. Its class token, or maximum, then gives way
            to the average of its positions, as CSRA does with ViT in Table 1. y_avg is then not the model's own
            prediction, and may be better or worse: measure it with lam = 0.

    Returns:
        Images in, logits (B, C) out, in the model's training mode; `head` is the CSRAHead. With lam = 0 the model's own
        prediction, up to rounding.

    Raises:
        TypeError: As of `attach_head`; or the model has no linear classifier.
        ValueError: The model does not average its positions (unless `replace_pooling`); or its classifier does not come
            directly after the pooling, for example in MobileNetV3, so that positions have no score; or lam is not
            finite.

    Numerics:
        A norm between pooling and classifier (ConvNeXt, average-pooled ViT) is not linear. It takes its statistics from
        the average of the positions, see `NormOfMean`; so lam = 0 is exact.

    Known limits:
        * What the model does is found out from its `forward_head`, with random features; a model without one, or on the
          meta device, is taken to average.
        * Dropout before the classifier is left out: this is for evaluation.

    Source:
        CSRA, Fig. 1, Table 1 and section 3.1 (no class token).
    """
    where = "with_max_score"
    if isinstance(model, HeadedModel) and isinstance(model.head, GAPHead):
        backbone, norm = model.backbone, model.norm
        head = CSRAHead.from_linear(model.head.fc, lam=fixed_lam(model) if lam is None else lam)
        return _in_mode(HeadedModel(backbone, norm, head, model.num_features), model.training)
    if isinstance(model, HeadedModel):
        _check.fail(where, "model", "one with a linear classifier", f"a {type(model.head).__name__}", TypeError)
    _timm_rules.check_model(where, model)
    linear = linear_classifier(where, "model", model)
    width = _timm_rules.feature_width(model)
    _check_pooling(where, model, linear, width, replace_pooling)
    head = CSRAHead.from_linear(linear, lam=fixed_lam(model) if lam is None else lam)
    norm = _timm_rules.take_norm(model, width)
    norm = norm if isinstance(norm, nn.Identity) else NormOfMean(norm)
    _timm_rules.strip(model)
    return _in_mode(MaxScoreModel(model, norm, head, width), model.training)


def _in_mode(model: HeadedModel, training: bool) -> HeadedModel:
    model.head.train(training)
    model.norm.train(training)
    model.training = training
    return model


@torch.no_grad()
def _check_pooling(where: str, model: nn.Module, linear: nn.Module, width: int, replace_pooling: bool) -> None:
    """That the logits of a model are its linear classifier on the average of its positions.

    Features that are the same at all positions tell whether anything but a pooling and a norm comes before the
    classifier; random ones tell whether the pooling is the average.
    """
    name = type(model).__name__
    must = "one whose classifier comes directly after the pooling"
    if _timm_rules.is_any(model, _timm_rules.INTERMEDIATES):
        _check.fail(where, "model", must, f"{name}, which pools several maps")
    if linear.weight[0].numel() != width:  # type: ignore[index]
        got = f"{name}, with {width} features and {linear.weight[0].numel()} inputs of the classifier"  # type: ignore[index]
        _check.fail(where, "model", must, got)
    weight = linear.weight
    if not hasattr(model, "forward_head") or weight.device.type == "meta":
        return
    norm = NormOfMean(_norm_of(model, width))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        random, constant = (_reads_average(model, norm, linear, width, spread) for spread in (1.0, 0.0))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not constant:
        _check.fail(where, "model", must, f"{name}, which has other layers between them")
    if not random and not replace_pooling:
        pooling = getattr(model, "global_pool", None)
        got = f"{name}" + (f" with global_pool={pooling!r}" if isinstance(pooling, str) else "")
        must = "one that averages its positions, or replace_pooling=True (the average in place of its own pooling)"
        _check.fail(where, "model", must, got)


def _norm_of(model: nn.Module, width: int) -> nn.Module:
    """The norm between pooling and classifier, which stays where it is."""
    owners = [module for module in (model, getattr(model, "head", None)) if isinstance(module, nn.Module)]
    kept = [(m, name, m._modules[name]) for m in owners for name in ("norm", "fc_norm") if name in m._modules]
    norm = _timm_rules.take_norm(model, width)
    for module, name, value in kept:
        setattr(module, name, value)
    return norm


def _reads_average(model: Any, norm: nn.Module, linear: Any, width: int, spread: float) -> bool:
    """Whether `forward_head` is the classifier on the normed average, for features that vary so much over positions."""
    weight = linear.weight.flatten(1)
    generator = torch.Generator().manual_seed(0)
    prefix = getattr(model, "num_prefix_tokens", None) or 0
    # forward_features alone tells whether there are maps or tokens; the wrong layout does not get through forward_head.
    nhwc = getattr(model, "output_fmt", None) == "NHWC"
    for shape in [(3, 5, width)] if nhwc else [(width, 3, 5), (prefix + 7, width)]:
        base = torch.randn([2, *(n if n == width else 1 for n in shape)], generator=generator)
        features = (base + spread * torch.randn(2, *shape, generator=generator)).to(weight.device, weight.dtype)
        try:
            pooled, logits = model.forward_head(features, pre_logits=True), model.forward_head(features)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
            continue
        positions = norm(_timm_rules.without_prefix(model, features))
        average = positions.mean((2, 3)) if positions.ndim == 4 else positions.mean(1)
        if _alike(pooled, average) and _alike(logits, F.linear(average, weight, linear.bias)):
            return True
    return False


def _alike(found: Any, expected: Tensor) -> bool:
    """Equal up to rounding, TF32's included."""
    if not isinstance(found, Tensor) or found.numel() != expected.numel():
        return False
    expected = expected.float()
    tolerance = 5e-2 if found.dtype in (torch.float16, torch.bfloat16) else 1e-2
    error = (found.float().reshape(expected.shape) - expected).abs().max()
    return bool(error <= tolerance * expected.abs().max())
