"""CSRA's Fig. 1: an already trained linear classifier, with its largest score added to its average score."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..ops import csra_pool
from .csra import linear_parameters
from .gap import GAPHead

# CSRA, Table 1, "Fixed lambda": one value for "models in the ResNet family", one "for all other models".
LAM_RESNET = 0.02
LAM_OTHER = 0.2

# The classes of timm and torchvision that are ResNets: with ResNeXt, SE-ResNet, Res2Net, ResNeSt and others of the
# first, and the pre-activation ResNets (BiT) of the second.
RESNETS = ("ResNet", "ResNetV2")

# torch's, and timm's for tokens and maps.
RMS_NORMS = ("RMSNorm", "RmsNorm", "RmsNorm2d")


def fixed_lam(model: nn.Module) -> float:
    """CSRA's fixed lam for a model, by the class of its backbone: 0.02 for ResNets and 0.2 for all other models."""
    backbone = getattr(model, "backbone", model)
    return LAM_RESNET if any(cls.__name__ in RESNETS for cls in type(backbone).__mro__) else LAM_OTHER


def linear_classifier(where: str, argument: str, model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The linear classifier of a model, a GAPHead, or the module itself if it is one.

    Raises:
        TypeError: There is none, or none that is linear; the message says what there is.
    """
    found, of = model, ""
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        found, of = get_classifier(), f" as the classifier of {type(model).__name__}"
    if isinstance(found, GAPHead):
        found = found.fc
    if not isinstance(found, (nn.Linear, nn.Conv2d)):
        must = "an nn.Linear or a 1x1 nn.Conv2d, or a model whose get_classifier() gives one"
        kind = type(found).__name__
        if isinstance(found, tuple):
            kind = f"a tuple of {len(found)} (a distilled model averages several classifiers)"
        elif isinstance(found, nn.Identity):
            kind = "Identity (the model was made without a classifier, for example with num_classes=0)"
        _check.fail(where, argument, must, kind + of, TypeError)
    linear_parameters(where, argument, found)
    return found


def plain_max_score(model_or_classifier: nn.Module, features: Tensor, lam: float | None = None) -> Tensor:
    """The logits of a trained linear classifier with its largest score added, without any training.

    logits[b, c] = mean_l s[b, c, l] + lam * max_l s[b, c, l]      with s[b, c, l] = sum_d x[b, l, d] w[c, d] + bias[c]

    Args:
        model_or_classifier: An nn.Linear; a 1x1 nn.Conv2d; a GAPHead; or a model whose `get_classifier()` gives one of
            them, as those of timm do.
        features: What the classifier would see without the average pooling: maps (B, D, H, W) or tokens (B, L, D),
            without prefix tokens. If the model applies a norm after its pooling, it must be in them;
            `with_max_score(model)` sees to that.
        lam: The weight of the largest score, finite. By default CSRA's fixed value for the model, 0.02 for ResNets and
            0.2 for all others. A classifier alone does not tell its model, so there it must be given.

    Returns:
        (B, C), with a gradient to the features and to the classifier, as of any other op.

    Raises:
        TypeError: There is no linear classifier, for example in a distilled model, which has two; or the features are
            no floating tensor, or of another dtype than the classifier.
        ValueError: The features do not fit, or lam is missing or not finite.
        BackendError: An explicitly chosen backend cannot run this call.

    Source:
        CSRA, Fig. 1 and Table 1: `csra_pool` with one head, T = inf and no normalisation (Eq. 9).
    """
    where, argument = "plain_max_score", "model_or_classifier"
    if not isinstance(model_or_classifier, nn.Module):
        _check.fail(where, argument, "an nn.Module", type(model_or_classifier).__name__, TypeError)
    linear = linear_classifier(where, argument, model_or_classifier)
    weight, bias = linear_parameters(where, argument, linear)
    if lam is None:
        if not callable(getattr(model_or_classifier, "get_classifier", None)):
            must = (
                f"given for a classifier alone, which does not tell its model: CSRA takes {LAM_RESNET} for ResNets and "
                f"{LAM_OTHER} for all other models"
            )
            _check.fail(where, "lam", must, None)
        lam = fixed_lam(model_or_classifier)
    _check.check_tensor(where, "features", features)
    D = weight.shape[1]
    if features.ndim not in (3, 4) or features.shape[1 if features.ndim == 4 else 2] != D:
        _check.fail(where, "features", f"maps (B, {D}, H, W) or tokens (B, L, {D})", tuple(features.shape))
    return csra_pool(features, weight[None], None if bias is None else bias[None], temperatures=(math.inf,), lam=lam)


class NormOfMean(nn.Module):
    """A norm that a model applies to the mean of its positions, taken to every position with the mean's statistics.

    y_l = (x_l - g) * gamma / sigma(g) + norm(g)      with g = mean_l x_l

    So the mean of y is norm(g), what the model's classifier has been trained on; a norm of each position by its own
    statistics would have another mean. For LayerNorm sigma^2 = var_d(g) + eps, for RMSNorm mean_d(g^2) + eps.

    Args:
        norm: A LayerNorm or RMSNorm over the features, of torch or timm; anything else is applied to every position as
            it is, which is the same for a BatchNorm in evaluation.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normed maps (B, D, H, W) or tokens (B, L, D)."""
        norm: Any = self.norm
        layer = isinstance(norm, nn.LayerNorm)
        if not layer and type(norm).__name__ not in RMS_NORMS:
            return norm(x)
        positions = (2, 3) if x.ndim == 4 else (1,)
        g = x.mean(positions, dtype=torch.promote_types(x.dtype, torch.float32))  # (B, D)
        centre = g.mean(-1, keepdim=True) if layer else g.new_zeros(())
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        scale = ((g - centre).square().mean(-1, keepdim=True) + eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -centre * scale
        if getattr(norm, "bias", None) is not None:
            shift = shift + norm.bias
        shape = (*g.shape, 1, 1) if x.ndim == 4 else (g.shape[0], 1, g.shape[1])
        scale, shift = (v.expand_as(g).to(x.dtype).reshape(shape) for v in (scale, shift))
        return torch.addcmul(shift, x, scale)
