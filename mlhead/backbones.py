"""Attaching a head to a backbone: any timm architecture, or a model that offers features as timm's do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _timm_rules
from .heads import HEADS
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
