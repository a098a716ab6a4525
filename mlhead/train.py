"""The training loop: exact after any interruption, plain about what it does."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlhead import building, checkpoints
from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._runlog import RunLog
from mlhead._usage import UsageError, require, usage_fail
from mlhead.data.loading import Batch, evaluation_loader, training_loader
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, open_source
from mlhead.evaluation import autocast, choose_device, evaluate, to_device
from mlhead.metrics import MultiLabelMetrics

# What a resumed run may change; everything else would make it another run.
CHANGEABLE = ("device", "workers", "log_every", "checkpoint_every")


class Summary(NamedTuple):
    """How a run ended: folder, steps, last and best validation metrics, images per second of training, its task."""

    out: Path
    steps: int
    metrics: dict[str, float]
    best: dict[str, float]
    images_per_s: float
    zero_shot: bool = False


class Trainer:
    """One run, from its first step or from where a checkpoint left it.

    Args:
        config: every option.
        resume: a checkpoint's state, or None.
        stream: where progress goes, by default stderr.
    """

    def __init__(self, config: TrainConfig, resume: dict[str, Any] | None = None, stream: Any = None) -> None:
        self.config, self.stream = config, stream
        self.out = Path(config.out)
        self.device = choose_device(config.device)
        require("torchmetrics", "mlhead train")  # now rather than at the first evaluation
        checkpoints.seed_everything(config.seed)
        self.bad_data = BadDataLog(config.on_bad_data, self._say, self.out / "bad_data.txt")
        self.source = open_source(config, self.bad_data, resume["class_names"] if resume else None)
        self.num_classes = self.source.num_seen

        vectors = self.source.word_vectors
        if vectors is not None:  # a checkpoint's reader knows it from the options
            config.head_opt = {**config.head_opt, "word_dim": vectors.shape[1]}
        model = building.build_model(
            config,
            self.num_classes,
            self.source.channels,
            self.source.frequencies(),
            word_vectors=vectors,
            load_weights=resume is None,
        )
        self.spec = ImageSpec(**resume["image_spec"]) if resume else self.source.image_spec(model.backbone)
        self.train_set = self.source.dataset("train", self.spec)
        self.val_set = self.source.dataset("val", self.spec)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model.to(self.device).train()
        self.loss = building.build_loss(config).to(self.device)
        if config.fused_loss:
            self.model.head.loss = self.loss

        length, per_step = len(self.train_set), config.batch_size * config.accumulate  # type: ignore[arg-type]
        self.batches_per_epoch = length // config.batch_size
        if self.batches_per_epoch == 0:
            usage_fail("--batch-size", f"at most {length}, the number of training images", config.batch_size)
        self.steps_per_epoch = max(1, length // per_step)
        self.total_steps = config.steps or max(1, round(config.epochs * self.batches_per_epoch / config.accumulate))
        self.eval_every = config.eval_every or self.steps_per_epoch
        self.checkpoint_every = config.checkpoint_every or self.eval_every

        self.optimizer = building.build_optimizer(config, model)
        self.schedule, self.schedule_step = building.build_schedule(config, self.optimizer, self.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.ema = None
        if config.ema > 0:
            utils = require("timm.utils", "--ema")
            self.ema = utils.ModelEmaV3(self.model, decay=config.ema, use_warmup=True)

        self.step = 0
        self.best: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._loss_sum, self._loss_count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        if resume is not None:
            self._restore(resume)
        self.log = RunLog(self.out, self.step if resume is not None else None)

    def _say(self, line: str) -> None:
        progress = getattr(self, "progress", None)
        if progress is None:
            progress = Progress(0, "", stream=self.stream)
        progress.say(line)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and what `eval` and `predict` need."""
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "class_names": self.source.class_names,
            "num_seen": self.num_classes,
            "image_spec": self.spec.to_dict(),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoints.random_state(),
            "loss_sum": self._loss_sum.item(),
            "loss_count": self._loss_count,
            "best": self.best,
            "metrics": self.metrics,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        self._loss_sum.fill_(state["loss_sum"])
        self._loss_count = state["loss_count"]
        checkpoints.set_random_state(state["random"])

    def fit(self) -> Summary:
        """Trains to the end.

        Raises:
            FloatingPointError: the loss is not finite; no checkpoint is written from then on.
            UsageError: bad data under --on-bad-data error.
        """
        config = self.config
        loader = training_loader(
            self.train_set,
            self.num_classes,
            config.batch_size,
            seed=config.seed,
            first=self.step * config.accumulate,
            last=self.total_steps * config.accumulate,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            sparse=config.fused_loss,
        )
        per_step = config.batch_size * config.accumulate
        self.progress = Progress(self.total_steps, "training", start=self.step, unit_size=per_step, stream=self.stream)
        batches = iter(loader)
        while self.step < self.total_steps:
            grad_norm = self._one_step([next(batches) for _ in range(config.accumulate)])
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                self._log_training(grad_norm)
            self.progress.advance()
            last = self.step == self.total_steps
            if self.step % self.eval_every == 0 or last:
                with self.progress.pause():
                    self._validate()
            if self.step % self.checkpoint_every == 0 or last:
                with self.progress.pause():
                    self._check_finite()
                    checkpoints.save_checkpoint(self.out / "last.pt", self.state())
        rate = self.progress.rate
        self.progress.close()
        if summary := self.bad_data.summary():
            self._say(summary)
        return Summary(self.out, self.step, self.metrics, self.best, rate, config.task == "zero-shot")

    def _one_step(self, batches: list[Batch]) -> Tensor | None:
        """One update from the gradients of some batches; returns the gradient's norm where it is clipped."""
        config = self.config
        total = sum(len(batch.images) for batch in batches)
        for batch in batches:
            self.bad_data.add(batch.bad)
            if len(batch.images) == 0:
                continue
            images, targets = to_device(batch, config, self.device)
            with autocast(config, self.device):
                loss = self.model(images, targets) if config.fused_loss else self.loss(self.model(images), targets)
            # Every image weighs alike, also when unreadable ones have left the batches of different sizes.
            share = len(batch.images) / total
            self.scaler.scale(loss * share).backward()
            self._loss_sum += loss.detach() * share
        self._loss_count += 1 if total else 0
        grad_norm = None
        scale = self.scaler.get_scale()
        if total:
            if config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A step that the scaler skipped for its overflow does not move the schedule; torch would warn about it.
        if total and self.scaler.get_scale() >= scale:
            self.schedule_step(self.step)
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return grad_norm

    def _check_finite(self) -> None:
        if not math.isfinite(self._loss_sum.item()):
            raise FloatingPointError(
                f"the loss is {self._loss_sum.item()} at step {self.step}: training has diverged; try a lower --lr or "
                f"--clip-grad 1. The last good state is in {self.out / 'last.pt'}, if a checkpoint was due before"
            )

    def _log_training(self, grad_norm: Tensor | None) -> None:
        self._check_finite()
        loss = self._loss_sum.item() / max(1, self._loss_count)
        rates = {group["part"]: group["lr"] for group in self.optimizer.param_groups}
        values = {"loss": loss, "lr": rates.get("backbone", 0.0), "lr_head": rates.get("head", 0.0)}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm.item()
        speed = round(self.progress.rate, 1) if self.progress.count > self.progress.start else 0.0
        epoch = round(self.step / self.steps_per_epoch, 4)
        self.log.add("train", self.step, epoch=epoch, images_per_s=speed, time_s=round(time.time(), 3), **values)
        self.progress.advance(0, f"loss {loss:.4f}")
        self._loss_sum.zero_()
        self._loss_count = 0

    def _validate(self) -> None:
        config = self.config
        loader = evaluation_loader(self.val_set, self.num_classes, config.batch_size, workers=config.workers)
        model = self.ema.module if self.ema is not None else self.model
        metrics = MultiLabelMetrics(self.num_classes, device=self.device)
        self.metrics = evaluate(model, loader, config, metrics, self.device, self.bad_data)
        self.metrics["step"] = self.step
        values = {name: value for name, value in self.metrics.items() if name != "step"}
        epoch = round(self.step / self.steps_per_epoch, 4)
        self.log.add("val", self.step, epoch=epoch, time_s=round(time.time(), 3), **values)
        shown = "  ".join(f"{name} {values[name]:.4f}" for name in ("mAP", "CF1", "OF1"))
        better = values["mAP"] > self.best.get("mAP", -1.0)
        self._say(f"step {self.step}: {shown}{'  (best)' if better else ''}")
        if better:
            self._check_finite()
            self.best = dict(self.metrics)
            checkpoints.save_checkpoint(self.out / "best.pt", self.state())


def train(config: TrainConfig, *, overwrite: bool = False, stream: Any = None) -> Summary:
    """A new run in `config.out`, which gets config.yaml, log.jsonl, log.csv, best.pt and last.pt.

    Raises:
        UsageError: the folder holds a run already and `overwrite` is False; or an option does not fit.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        usage_fail("--out", "a folder", f"the file {out}")
    if (out / "last.pt").exists() and not overwrite:
        usage_fail("--out", "a folder without a run (or use --overwrite, or --resume)", out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(out)
    for name in ("last.pt", "best.pt", "bad_data.txt"):
        (out / name).unlink(missing_ok=True)
    trainer = Trainer(config, stream=stream)
    config.save(out / "config.yaml")
    return trainer.fit()


def resume(path: Path, changes: dict[str, Any] | None = None, *, stream: Any = None) -> Summary:
    """Goes on with a run exactly where its checkpoint left it.

    Args:
        path: a checkpoint, or the folder of a run, of which last.pt is taken.
        changes: options to change, of `CHANGEABLE` only.
        stream: where progress goes, by default stderr.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        UsageError: an option that would make it another run.
    """
    path = path / "last.pt" if path.is_dir() else path
    state = checkpoints.load_checkpoint(path)
    for name in changes or {}:
        if name not in CHANGEABLE:
            raise UsageError(
                f"--{name.replace('_', '-')} must be left as it is on --resume, which goes on with the saved options "
                f"(only {', '.join(CHANGEABLE)} may change)"
            )
    config = TrainConfig(**{**state["config"], **(changes or {}), "out": str(path.parent)})
    checkpoints.remove_leftovers(path.parent)
    trainer = Trainer(config, resume=state, stream=stream)
    trainer._say(f"resuming {path} at step {trainer.step} of {trainer.total_steps}")
    return trainer.fit()
