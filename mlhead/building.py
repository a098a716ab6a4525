"""From the options of a run to a model, a loss, an optimizer and a schedule, with errors that name the option."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlhead import losses
from mlhead._config import TrainConfig
from mlhead._usage import UsageError, closest, require, usage_fail
from mlhead.backbones import HeadedModel, attach_head
from mlhead.checkpoints import CheckpointError, load_checkpoint
from mlhead.heads import HEADS, QueryAugmentation
from mlhead.optim import ClassAdamW, ClassOptimizer, ClassSGD
from mlhead.smallnet import SmallNet

LOSSES: dict[str, type[nn.Module]] = {
    "bce": losses.BinaryCrossEntropy,
    "asl": losses.AsymmetricLoss,
    "softmax": losses.SoftmaxCrossEntropy,
}


def build_backbone(config: TrainConfig, channels: int) -> nn.Module:
    """The backbone that --backbone names.

    Raises:
        UsageError: timm has no such architecture, no published weights for it, or it does not take an option.
    """
    if config.backbone == "small":
        if config.pretrained:
            usage_fail("--pretrained", "off for the small backbone, which has no published weights", True)
        if config.backbone_opt:
            usage_fail("--backbone-opt", "absent for the small backbone", config.backbone_opt)
        return SmallNet(channels)
    timm = require("timm", "mlhead train")
    if not timm.is_model(config.backbone):
        hint = closest(config.backbone, ["small", *timm.list_models()])
        usage_fail("--backbone", "'small' or a timm architecture (timm.list_models())", repr(config.backbone) + hint)
    if config.pretrained and not timm.models.is_model_pretrained(config.backbone):
        usage_fail("--pretrained", "off for an architecture without published weights", config.backbone)
    try:
        return timm.create_model(
            config.backbone, pretrained=config.pretrained, in_chans=channels, num_classes=0, **config.backbone_opt
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(f"--backbone {config.backbone} could not be built: {_one_line(error)}") from error
    except Exception as error:  # a download fails in many ways
        if not config.pretrained:
            raise
        raise UsageError(
            f"--pretrained must be off where the weights of {config.backbone} cannot be had from the network or from "
            f"timm's cache, got {type(error).__name__}: {_one_line(error)}"
        ) from error


def build_model(
    config: TrainConfig,
    num_classes: int,
    channels: int,
    frequencies: Tensor | None = None,
    *,
    word_vectors: Tensor | None = None,
    load_weights: bool = True,
) -> HeadedModel:
    """Backbone and head.

    Args:
        config: the options of a run.
        num_classes: C, the classes that are trained.
        channels: of the images.
        frequencies: (C,) at which the head's bias starts, where it has one; None leaves it as it is.
        word_vectors: for a zero-shot head (C + U, W), of the C classes and then of unseen ones: its banks "train",
            "test" and "union". None where a checkpoint brings them; `head_opt` then says `word_dim`.
        load_weights: False where a checkpoint replaces all weights anyway: --pretrained and --init-backbone do nothing.

    Raises:
        UsageError: an unknown backbone, head or option of either, or one that does not fit.
    """
    options = dict(config.head_opt)
    _check_names(options, HEADS[config.head], "--head-opt", f"head {config.head}")
    if config.task == "zero-shot":
        options |= _zero_shot_options(config, num_classes, word_vectors)
    chosen = config if load_weights else dataclasses.replace(config, pretrained=False)
    backbone = build_backbone(chosen, channels)
    try:
        model = attach_head(backbone, config.head, num_classes, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--head {config.head} on --backbone {config.backbone}: {_one_line(error)}") from error
    if config.init_backbone is not None and load_weights:
        _init_backbone(model, Path(config.init_backbone))
    has_bias = any(name.endswith("bias") for name, _ in model.head.named_parameters())
    if frequencies is not None and config.prior and options.get("prior") is None and has_bias:
        model.head.set_prior(frequencies)  # type: ignore[operator]
    return model


def _zero_shot_options(config: TrainConfig, num_seen: int, word_vectors: Tensor | None) -> dict[str, Any]:
    """What a zero-shot head takes besides the options that the command line gives."""
    options: dict[str, Any] = {}
    if word_vectors is not None:
        banks = {"train": word_vectors[:num_seen], "test": word_vectors[num_seen:], "union": word_vectors}
        options["word_vectors"] = {name: bank for name, bank in banks.items() if len(bank)}
    if config.query_noise or config.random_queries:
        options["augmentation"] = QueryAugmentation(config.query_noise, config.random_queries)
    return options


def _init_backbone(model: HeadedModel, path: Path) -> None:
    """The backbone's weights of another run, whatever its head and classes."""
    try:
        weights = load_checkpoint(path, mmap=True)["model"]
    except CheckpointError as error:
        raise UsageError(f"--init-backbone: {error}") from error
    try:
        for part in ("backbone", "norm"):
            prefix = f"{part}."
            own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
            getattr(model, part).load_state_dict(own)
    except RuntimeError as error:
        raise UsageError(
            f"--init-backbone must be a run with the same backbone, got {path}: {_one_line(error)}"
        ) from error


def build_loss(config: TrainConfig) -> nn.Module:
    """The loss that --loss names."""
    kind = LOSSES[config.loss]
    _check_names(config.loss_opt, kind, "--loss-opt", f"loss {config.loss}", without=("pos_weight", "class_weight"))
    if config.loss_opt.get("reduction", "mean") not in ("mean", "sum"):
        usage_fail("--loss-opt reduction", "mean or sum", repr(config.loss_opt["reduction"]))
    try:
        return kind(**config.loss_opt)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--loss-opt of {config.loss}: {_one_line(error)}") from error


Mixing = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def build_mixup(config: TrainConfig) -> Mixing | None:
    """What mixes a training batch by --mixup and --cutmix, or None without them.

    It takes and returns images, dense targets (B, C) and their weights (B, C) or None. Each image is mixed with the one
    before it, by one number for the batch, which may have any size; a label counts as the less certain of the two. The
    numbers are drawn from torch's global random state.
    """
    if not config.mixup and not config.cutmix:
        return None
    v2 = require("torchvision.transforms.v2", "--mixup")
    kinds = [kind(alpha=alpha) for kind, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    choice = v2.RandomChoice(kinds)

    def mix(images: Tensor, targets: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        images, targets = choice(images, targets)
        if config.mix_threshold is not None:
            targets = (targets > config.mix_threshold).to(targets.dtype)
        return images, targets, None if weight is None else torch.minimum(weight, weight.roll(1, 0))

    return mix


def scores_as_logits(config: TrainConfig, logits: Tensor) -> Tensor:
    """Logits (B, C) whose sigmoid is the model's probability: the logits themselves, but of the softmax loss.

    There log(p / (1 - p)), finite and in the order of the logits however sure the model is.
    """
    if config.loss != "softmax":
        return logits
    z = logits.double()
    top, best = z.max(dim=1, keepdim=True)
    log_p = z.log_softmax(dim=1)
    odds = log_p - torch.log1p(-log_p.exp())
    # Of the best class 1 - p may round to 0; the sum over the others does not.
    odds = odds.scatter(1, best, top - z.scatter(1, best, -torch.inf).logsumexp(dim=1, keepdim=True))
    return odds.float().clamp(max=torch.finfo(torch.float32).max)  # a single class has no others


def _check_names(options: dict[str, Any], kind: type, argument: str, owner: str, without: tuple[str, ...] = ()) -> None:
    skip = {"self", "in_features", "num_classes", "loss", "device", "dtype", "word_vectors", "augmentation", *without}
    known = [name for name in inspect.signature(kind.__init__).parameters if name not in skip]  # type: ignore[misc]
    for name in options:
        if name not in known:
            usage_fail(argument, f"an option of {owner}: {', '.join(known)}", repr(name) + closest(name, known))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def build_optimizer(config: TrainConfig, model: HeadedModel) -> torch.optim.Optimizer:
    """Timm's optimizer of that name over four groups: backbone and head, with and without weight decay.

    Without the parameter that `build_update` takes.
    """
    optim = require("timm.optim", "mlhead train")
    names = optim.list_optimizers()
    if config.optimizer.lower() not in names:
        hint = closest(config.optimizer, names)
        usage_fail("--optimizer", "one of timm's (timm.optim.list_optimizers())", repr(config.optimizer) + hint)
    updated = model.head.class_parameter if config.fused_update else None
    not_head = nn.ModuleDict({"backbone": model.backbone, "norm": model.norm})
    groups = []
    for part, module, rate in (
        ("backbone", not_head, config.lr),
        ("head", model.head, config.lr * config.head_lr_mult),
    ):
        # ML-Decoder's bias has two axes where its classes are shared out.
        keep = model.no_weight_decay() if part == "backbone" else {"duplicate_pooling_bias"}
        for group in optim.param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=keep):
            group["params"] = [p for p in group["params"] if p is not updated]
            if group["params"]:
                groups.append({**group, "lr": rate, "part": part})
    try:
        return optim.create_optimizer_v2(
            groups, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay, **config.optimizer_opt
        )
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        raise UsageError(f"--optimizer {config.optimizer} could not be built: {_one_line(error)}") from error


def build_update(config: TrainConfig, model: HeadedModel) -> ClassOptimizer | None:
    """The optimizer of the classes' weight inside backward, for --fused-update: timm's of that name."""
    if not config.fused_update:
        return None
    weight = model.head.class_parameter
    group = {"params": [weight], "lr": config.lr * config.head_lr_mult, "part": "head"}
    options = {"weight_decay": config.weight_decay, **config.optimizer_opt}
    try:
        if config.optimizer.lower() == "adamw":
            return ClassAdamW([group], **options)
        return ClassSGD([group], **{"momentum": 0.9, "nesterov": config.optimizer.lower() == "sgd", **options})
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {config.optimizer} with --fused-update: {_one_line(error)}") from error


def build_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> tuple[Any, Callable[[int], None]]:
    """The schedule, which has a state dict, and a function to call with the number of steps done."""
    warmup = min(round(config.warmup * total_steps), total_steps - 1)
    if config.schedule == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        # One more than the run has: the step past the last one would be an error after the last update.
        steps, share = total_steps + 1, config.warmup
        if abs(share * steps - 1) < 1e-6:  # torch would divide by the length of a rise of no step
            share = 0.0
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=steps, pct_start=share, cycle_momentum=False
        )
        return schedule, lambda step: schedule.step()
    timm_scheduler = require("timm.scheduler", "mlhead train")
    # As a prefix, the rise ends at the full rate; without, at the value that the cosine has by then.
    cosine = timm_scheduler.CosineLRScheduler(
        optimizer, t_initial=total_steps - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    cosine.step_update(0)
    return cosine, cosine.step_update
