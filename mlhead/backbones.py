"""Attaching a head to a backbone: any timm architecture, or a model that offers features as timm's do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _check, _timm_rules
from .heads import HEADS, CSRAHead, GAPHead
from .heads.max_score import NormOfMean, fixed_lam, linear_classifier
from .ops import SparseTargets
from .ops._loss_options import Targets
from .ops._loss_update import Update


class HeadedModel(nn.Module):
    """A backbone without its classifier, and a head. Made by `attach_head`.

    `model(images)` is the logits (B, C), `model(images, targets)` the head's loss. Both are the forward of this module,
    so a loss in the head works under DistributedDataParallel too.

    Attributes:
        backbone: The stripped model.
        norm: The norm that the model applied after its pooling, here applied to every position; or Identity.
        head: The head.
        num_features: D, the width of the features.
    """

    def __init__(self, backbone: nn.Module, norm: nn.Module, head: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = norm
        self.head = head
        self.num_features = num_features
        parameters = inspect.signature(head.forward).parameters
        self._takes_mask, self._takes_targets = "key_mask" in parameters, "targets" in parameters

    @property
    def num_classes(self) -> int:
        """C."""
        return self.head.num_classes  # type: ignore[return-value]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Facts about the weights (input size, mean, std), which timm's data configuration is made from."""
        return getattr(self.backbone, "pretrained_cfg", {})

    def _features(self, x: Any) -> tuple[Tensor, Tensor | None]:
        features, mask = _timm_rules.take_features(self.backbone, x)
        return _timm_rules.without_prefix(self.backbone, self.norm(features)), mask

    def forward_features(self, x: Any) -> Tensor:
        """What the head sees: a map (B, D, H, W), possibly in channels-last strides, or tokens (B, L, D).

        Args:
            x: As for `forward`.

        Raises:
            ValueError: The backbone gives neither a map nor tokens.
        """
        return self._features(x)[0]

    def forward(
        self,
        x: Any,
        targets: Targets | None = None,
        *,
        sample_weight: Tensor | None = None,
        ignore: Tensor | SparseTargets | None = None,
        update: Update | None = None,
    ) -> Tensor:
        """Logits (B, C) of images, or with targets the loss of the head.

        Args:
            x: Images (B, 3, height, width), or NaFlexViT's dictionary of patches.
            targets: None, or labels in any form that the head takes: y (B, C), `SparseTargets` and others, see `Head`.
            sample_weight: (B,), multiplies the loss of an image; only with targets.
            ignore: Elements of unknown label, see `Head`; only with targets.
            update: An optimizer that updates the head's `class_parameter` in backward, see `Head`; only with targets.

        Returns:
            (B, C); with targets a scalar.

        Raises:
            ValueError: As of the head; or it takes no targets, or no key_mask for masked patches, or the backbone gives
                neither a map nor tokens.
            TypeError: As of the head.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        options: dict[str, Any] = {
            "targets": targets,
            "sample_weight": sample_weight,
            "ignore": ignore,
            "update": update,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if options and not self._takes_targets:
            _check.fail("HeadedModel", "head", "one that takes targets, for a loss", type(self.head).__name__)
        features, mask = self._features(x)
        return self.head(features, **options, **self._mask_option(mask))

    def topk(self, x: Any, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes of each image; but for CSRA without the logits.

        Args:
            x: As for `forward`.
            k: How many, in [1, C].

        Returns:
            Scores (B, k), largest first, and classes (B, k) int64, see `Head.topk`.

        Raises:
            ValueError: As of the head; or it takes no key_mask for masked patches, or the backbone gives neither a map
                nor tokens.
            TypeError: As of the head.
            BackendError: An explicitly chosen backend cannot run this call.
            AttributeError: The head has no `topk`.
        """
        features, mask = self._features(x)
        return self.head.topk(features, k, **self._mask_option(mask))  # type: ignore[operator]

    def attention_maps(self, x: Any, classes: Tensor | Sequence[int]) -> Tensor:
        """Where the chosen classes look: the head's weights (B, K, L) over the positions of its features.

        Args:
            x: As for `forward`.
            classes: Class indices, (K,) for all images or (B, K) for each its own.

        Raises:
            ValueError: As of the head; or it takes no key_mask for masked patches, or the backbone gives neither a map
                nor tokens.
            TypeError: As of the head.
            RuntimeError: The head is a sharded one for word vectors.
            BackendError: An explicitly chosen backend cannot run this call.
            AttributeError: The head has no `attention_maps`.
        """
        features, mask = self._features(x)
        return self.head.attention_maps(features, classes, **self._mask_option(mask))  # type: ignore[operator]

    def _mask_option(self, mask: Tensor | None) -> dict[str, Tensor]:
        """The argument of the head that says which patches are none."""
        if mask is None:
            return {}
        if not self._takes_mask:
            must = "one that takes key_mask, for masked patches"
            _check.fail("HeadedModel", "head", must, type(self.head).__name__)
        return {"key_mask": mask}

    def get_classifier(self) -> nn.Module:
        """The head, under timm's name for it."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Makes the head one of `num_classes` classes, as its `reset` does.

        Raises:
            ValueError: The number is below 1, or the head's queries must be given anew.
            TypeError: The number is no integer.
            RuntimeError: The head is sharded.
            AttributeError: The head has no `reset`.
        """
        self.head.reset(num_classes)  # type: ignore[operator]

    def no_weight_decay(self) -> set[str]:
        """Parameters that the backbone's authors do not decay, for timm's optimizer factory."""
        names = getattr(self.backbone, "no_weight_decay", None)
        return set() if names is None else {f"backbone.{name}" for name in names()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches the backbone's gradient checkpointing.

        Raises:
            AttributeError: The backbone has no such method.
            AssertionError: It is one of timm's that have the method but no checkpointing.
        """
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


def attach_head(
    model: nn.Module, head: str | type[nn.Module] | nn.Module, num_classes: int, **head_options: Any
) -> HeadedModel:
    """Puts a head on a backbone in place of its pooling and classifier.

    Args:
        model: A timm model; or any other with `forward_features(x)`, giving maps (B, D, H, W) or tokens (B, L, D), and
            `num_features` = D (and `output_fmt = "NHWC"` for maps (B, H, W, D), `num_prefix_tokens` for tokens that
            stand for no position). It is taken over: its classifier, and what only the classifier used, are removed
            from it.
        head: "gap", "csra", "ml_decoder", "zero_shot" or "transformer_decoder"; or a class called as
            `head(in_features, num_classes, device=..., dtype=..., **head_options)`; or a module, used as it is and
            moved to the model's device and dtype.
        num_classes: C.
        head_options: Of the head, for example `groups=100`; `device` and `dtype` are the model's unless given.

    Returns:
        The model with its head, in the model's training mode.

    Raises:
        TypeError: The model does not offer what is looked for, the message says what that is; `head` is none of the
            above, or does not take an option; or `num_classes` is no integer.
        ValueError: There is no head of that name, or it refuses an option; the module's width or classes do not fit, or
            there are options for it; `num_classes` is below 1; or the model has such a head already.

    Known limits:
        * CrossViT, EfficientViM, PiT, CoaT and a few encoders (34 architectures of timm 1.0.31) keep trainable
          parameters that get no gradient; `unused_parameters` finds them, to be frozen or for DDP's
          find_unused_parameters.
        * Of models with several branches only the last scale is used.
        * Patches with a validity mask (NaFlexViT) need a head with `key_mask`: the decoders.
        * An image size other than the model's works where the backbone accepts it.
        * Known to work with every architecture of timm 1.0.31; older versions differ in the methods that are used.
    """
    where = "attach_head"
    if isinstance(model, HeadedModel):
        _check.fail(
            where, "model", "a model without a head of ours (use model.head or reset_classifier)", "HeadedModel"
        )
    _timm_rules.check_model(where, model)
    _check.check_positive(where, "num_classes", num_classes)
    width = _timm_rules.feature_width(model)
    # Everything that can fail for the caller's reasons is done before the model is touched.
    built = _build(where, head, width, num_classes, {**_inherited(model), **head_options}, bool(head_options))
    norm = _timm_rules.take_norm(model, width)
    _timm_rules.strip(model)
    headed = HeadedModel(model, norm, built, width)
    built.train(model.training)
    headed.training = model.training
    return headed


def _inherited(model: nn.Module) -> dict[str, Any]:
    """The device and dtype of the model's first floating parameter."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {}


def _build(
    where: str, head: Any, width: int, num_classes: int, options: dict[str, Any], has_own_options: bool
) -> nn.Module:
    if isinstance(head, nn.Module):
        if has_own_options:
            _check.fail(where, "head_options", "empty for a head that is already built", sorted(options))
        for name, value in (("in_features", width), ("num_classes", num_classes)):
            if getattr(head, name, value) != value:
                _check.fail(where, f"head.{name}", str(value), getattr(head, name))
        return head.to(**options)
    if isinstance(head, str):
        _check.check_choice(where, "head", head, tuple(HEADS))
        head = HEADS[head]
    if not (isinstance(head, type) and issubclass(head, nn.Module)):
        names = ", ".join(map(repr, HEADS))
        _check.fail(where, "head", f"one of {names}, or an nn.Module or its class", repr(head), TypeError)
    return head(width, num_classes, **options)


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


def unused_parameters(model: nn.Module, x: Any) -> list[str]:
    """The names of trainable parameters that get no gradient from `model(x).sum()`: freeze them, or tell DDP.

    Args:
        model: For example what `attach_head` returns; it is run once in evaluation mode and not changed.
        x: An example input, which may be on the meta device together with the model.

    Returns:
        Names as in `model.named_parameters()`.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        return []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            grads = torch.autograd.grad(model(x).sum(), list(trainable.values()), allow_unused=True)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [name for name, grad in zip(trainable, grads, strict=True) if grad is None]
