"""One training run: model, data and optimizer, its steps, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlhead import _dcp, _training_state, building, checkpoints
from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._run_steps import Steps, are_finite
from mlhead._runlog import RunLog
from mlhead._spread import Spread, true_shapes
from mlhead._usage import UsageError, require, usage_fail
from mlhead.data.loading import BadSample, Batch, Collate, evaluation_loader, training_loader
from mlhead.data.padding import pad_batch, padded_batches
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, open_source
from mlhead.distributed import ALONE, Processes, seed_of
from mlhead.evaluation import autocast, evaluate, new_metrics, to_device
from mlhead.metrics import main_measure


class Summary(NamedTuple):
    """How a run ended: folder, steps, last and best validation metrics, images per second of training, its task.

    data_wait: the share of the time of its steps in which it waited for data.
    """

    out: Path
    steps: int
    metrics: dict[str, float]
    best: dict[str, float]
    images_per_s: float
    zero_shot: bool = False
    data_wait: float = 0.0


class Saved(NamedTuple):
    """A checkpoint to go on with: where it is, and what was read of it (of a folder all but the tensors)."""

    path: Path
    state: dict[str, Any]


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        """As if it were written."""
        return len(text)


class _Waiting:
    """The share of the time of steps that went by in waiting for data."""

    def __init__(self) -> None:
        self.waited = self.passed = 0.0

    def add(self, waited: float, passed: float) -> None:
        self.waited += waited
        self.passed += passed

    @property
    def share(self) -> float:
        return self.waited / self.passed if self.passed else 0.0


class Trainer:
    """One run, from its first step or from where a checkpoint left it.

    Args:
        config: every option.
        resume: a checkpoint, or None.
        stream: where progress goes, by default stderr; only the main process says anything.
        processes: that train together, each on its part of every batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume: Saved | None = None,
        stream: Any = None,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.processes = config, processes
        self.stream: Any = stream if processes.is_main else _Nowhere()
        self.out = Path(config.out)
        self.device = processes.device(config.device)
        self.spread = Spread(config, processes, self.device)
        if processes.world == 1 and (config.class_parallel > 1 or config.parallel not in (None, "none")):
            self._say(
                "--parallel and --class-parallel are for several processes (torchrun -m mlhead train); this is one"
            )
        checkpoints.seed_everything(config.seed)
        listed = self.out / "bad_data.txt" if processes.is_main else None
        self.bad_data = BadDataLog(config.on_bad_data, self._say, listed, goes_on=resume is not None)
        self._told = 0
        state = resume.state if resume is not None else None
        self.source = open_source(config, self.bad_data, state["class_names"] if state else None)
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
        self.spec = ImageSpec(**state["image_spec"]) if state else self.source.image_spec(model.backbone)
        self.train_set = self.source.dataset("train", self.spec)
        self.val_set = self.source.dataset("val", self.spec)
        self._check_images(state)
        length = len(self.train_set)  # type: ignore[arg-type]
        self.batches_per_epoch = length // config.batch_size
        if self.batches_per_epoch == 0:
            usage_fail("--batch-size", f"at most {length}, the number of training images", config.batch_size)
        steps_per_epoch = self.batches_per_epoch / config.accumulate
        self.total_steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
        self.eval_every = config.eval_every or max(1, round(steps_per_epoch))
        self.checkpoint_every = config.checkpoint_every or self.eval_every

        self.model = self.spread.prepared(model, config.channels_last).train()
        self.ema = None
        if config.ema > 0:
            utils = require("timm.utils", "--ema")
            options = {"decay": config.ema, "use_warmup": config.ema_warmup, "foreach": not self.spread.has_shards}
            self.ema = utils.ModelEmaV3(self.model, **options)
            self.spread.shard(self.ema.module)
        self.spread.shard(self.model)
        self.loss, self.mix = building.build_loss(config).to(self.device), building.build_mixup(config)
        if config.fused_loss:
            self.model.head.loss = self.loss
        self.forward = self.spread.wrap(self.model, self._image_shape)

        self.steps = Steps(config, self.model, self.total_steps, self.spread)

        self.step = 0
        self.best: dict[str, float] = {}
        self.metrics: dict[str, float] = {}
        self._loss_sum, self._loss_count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        self._unread = 0  # images in a row, up to now, that could not be read
        self._waiting, self._waiting_in_all = _Waiting(), _Waiting()
        if not processes.is_main:  # the others must not drop out the same elements
            checkpoints.seed_everything(seed_of(config.seed, 0, processes.rank))
        if resume is not None:
            self._restore(resume)
        self.log: RunLog | None = None

    def _check_images(self, state: dict[str, Any] | None) -> None:
        """That there is something to validate on, and that a resumed run has the images that it began with."""
        listing = getattr(self.val_set, "listing", None)
        if self.config.metrics == "all" and listing is not None and not listing.positives(self.num_classes).any():
            usage_fail("--data", "such that a validation image has a label", f"none in {len(listing)} images")
        training = getattr(self.train_set, "listing", None)
        if self.config.loss == "softmax" and training is not None and training.has_unknown():
            usage_fail("--loss", "'bce' or 'asl' for training images with unknown labels", "'softmax'")
        for split, images in () if state is None else state.get("images", {}).items():
            now = self._images[split]
            if now != images:
                must = f"as it was when the run began, with {images} usable {split} images"
                usage_fail("--data", must, f"{now} in {self.config.data}")

    @property
    def _images(self) -> dict[str, int]:
        return {"train": len(self.train_set), "val": len(self.val_set)}  # type: ignore[arg-type]

    @property
    def _epoch(self) -> float:
        """Epochs up to now."""
        return round(self.step * self.config.accumulate / self.batches_per_epoch, 4)

    def _say(self, line: str) -> None:
        progress = getattr(self, "progress", None)
        if progress is None:
            progress = Progress(0, "", stream=self.stream)
        progress.say(line)

    @property
    def _average(self) -> nn.Module | None:
        """The model whose weights are the moving average."""
        return None if self.ema is None else self.ema.module

    def state(self) -> dict[str, Any]:
        """What the next step depends on, and what `eval` and `predict` need; all processes call it."""
        if self.processes.world > 1:
            shared = _training_state.shared_state(self.model, self._average, self.steps.optimizer)
        else:
            shared = {
                "model": self.model.state_dict(),
                "ema": None if self._average is None else self._average.state_dict(),
                "optimizer": self.steps.optimizer.state_dict(),
            }
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "class_names": self.source.class_names,
            "num_seen": self.num_classes,
            "image_spec": self.spec.to_dict(),
            "images": self._images,
            **shared,
            **self.steps.state(),
            "loss_count": self._loss_count,
            "best": self.best,
            "metrics": self.metrics,
        }

    def _own_state(self) -> dict[str, Any]:
        """What each process has for itself."""
        return {"random": checkpoints.random_state(), "loss_sum": self._loss_sum.item()}

    def _save(self, name: str) -> None:
        """Writes a checkpoint: a file of one process, a folder of several."""
        file, folder = self.out / f"{name}.pt", self.out / f"{name}.dcp"
        if self.processes.world > 1:
            _dcp.save(folder, self.state(), self._own_state(), self.processes, true_shapes(self.model))
        else:
            checkpoints.save_checkpoint(file, {**self.state(), **self._own_state()})
        if self.processes.is_main:  # a run may have been resumed with another number of processes
            checkpoints.remove(file if self.processes.world > 1 else folder)

    def _restore(self, saved: Saved) -> None:
        state, processes = saved.state, self.processes
        _training_state.restore(saved.path, state, self.model, self._average, self.steps.optimizer, processes)
        self.steps.load(state)
        self.step, self.best, self.metrics = state["step"], state["best"], state["metrics"]
        self._loss_count = state["loss_count"]
        own = state.get("own", [state])
        if len(own) == processes.world:
            self._loss_sum.fill_(own[processes.rank]["loss_sum"])
            checkpoints.set_random_state(own[processes.rank]["random"])
        else:
            mean = sum(each["loss_sum"] for each in own) / len(own)
            self._loss_sum.fill_(mean)
            checkpoints.seed_everything(seed_of(self.config.seed, self.step, processes.rank))

    def fit(self) -> Summary:
        """Trains to the end.

        Raises:
            FloatingPointError: the loss is not finite; no checkpoint is written from then on.
            UsageError: bad data under --on-bad-data error.
        """
        config = self.config
        if self.processes.is_main:
            self.log = RunLog(self.out, self.step if self.step else None)
            self.bad_data.begin()
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
            untagged_weight=config.untagged_weight,
            share=self.processes.share,
        )
        per_step = config.batch_size * config.accumulate
        self.progress = Progress(self.total_steps, "training", start=self.step, unit_size=per_step, stream=self.stream)
        batches = iter(loader)
        while self.step < self.total_steps:
            grad_norm = self._timed_step(batches)
            last = self.step == self.total_steps
            if self.step % config.log_every == 0 or last:
                self._log_training(grad_norm)
            self.progress.advance()
            evaluates = self.step % self.eval_every == 0 or last
            saves = self.step % self.checkpoint_every == 0 or last
            if evaluates or saves:
                self._check_finite(weights=True)
                with self.progress.pause():
                    for model in (self.model, self._average):
                        self.spread.average_statistics(model)
                    if evaluates:
                        self._validate()
                    if saves:
                        self._save("last")
        rate = self.progress.rate
        self.progress.close()
        if summary := self.bad_data.summary():
            self._say(summary)
        if self.steps.skipped:
            self._say(f"{self.steps.skipped} steps were skipped, whose gradients overflowed in fp16")
        wait = self.processes.largest(self._waiting_in_all.share)
        return Summary(self.out, self.step, self.metrics, self.best, rate, config.task == "zero-shot", wait)

    def _timed_step(self, batches: Iterator[Batch]) -> Tensor | None:
        began = time.perf_counter()
        chosen = [next(batches) for _ in range(self.config.accumulate)]
        waited = time.perf_counter() - began
        grad_norm = self._one_step(chosen)
        for waiting in (self._waiting, self._waiting_in_all):
            waiting.add(waited, time.perf_counter() - began)
        return grad_norm

    def _one_step(self, batches: list[Batch]) -> Tensor | None:
        """One update from the gradients of some batches; returns the gradient's norm where it is clipped."""
        config, world = self.config, self.processes.world
        for batch in batches:
            self.bad_data.add(batch.bad)
        total = int(self.processes.total(sum(len(batch.images) for batch in batches)))
        complete = total == config.batch_size * config.accumulate
        used = [batch for batch in batches if total and (world > 1 or len(batch.images))]
        for batch in used:
            with self.spread.communicates(self.forward, now=batch is used[-1]):
                loss = self._loss_of(batch, complete) * self._share(len(batch.images), total)
                self.steps.backward(loss)
            self._loss_sum += loss.detach()
        self._loss_count += 1 if total else 0
        self._unread = 0 if total else self._unread + config.batch_size * config.accumulate
        if self._unread >= len(self.train_set):  # type: ignore[arg-type]
            raise UsageError(f"--data must hold images that can be read, but of the last {self._unread} none could")
        self.step += 1
        grad_norm = self.steps.apply(self.step) if total else None
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return grad_norm

    def _share(self, images: int, total: int) -> float:
        """What the loss of a batch is multiplied by, for the step's to be the mean or the sum over its `total` images.

        Every image weighs alike, also when unreadable ones have left the batches of different sizes.
        """
        whole, world = self.config.batch_size, self.processes.world
        if self.config.loss_opt.get("reduction", "mean") == "mean":
            return (images if world == 1 else whole) / total
        # Gradients are means over the processes; the loss in the head is that of all who share its classes.
        return world / (self.spread.classes if self.config.fused_loss else 1)

    def _loss_of(self, batch: Batch, complete: bool) -> Tensor:
        """The loss of a batch; `complete` is whether all images of the step could be read, by all processes."""
        config, real = self.config, None
        images, targets = to_device(batch, config, self.device)
        weight = None if batch.weight is None else batch.weight.to(self.device, non_blocking=True)
        if self.mix is not None and len(images):
            assert isinstance(targets, Tensor)
            images, targets, weight = self.mix(images, targets, weight)
        if self.processes.world > 1 and not complete:
            # Collectives need as many images of each process; those that are added weigh nothing.
            size = config.batch_size // self.processes.world
            padded, real = pad_batch(Batch(images, targets, [], weight), size, self._image_shape)
            images, targets, weight = padded.images, padded.targets, padded.weight
        with autocast(config, self.device):
            if config.fused_loss:
                update = {} if self.steps.update is None else {"update": self.steps.update}
                return self.forward(images, targets, sample_weight=real, **update)
            logits = self.forward(images)
            if real is not None:
                weight = real if weight is None else weight * real.unsqueeze(1)
            return self.loss(logits, targets) if weight is None else self.loss(logits, targets, weight=weight)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.spec.channels, self.spec.height, self.spec.width

    def _check_finite(self, *, weights: bool = False) -> float:
        """The mean over the processes of the sum of the losses since the last line of the log.

        Raises:
            FloatingPointError: it is not finite; or, if these are looked at too, a weight is not.
        """
        loss = self.processes.total(self._loss_sum.item()) / self.processes.world
        found = "" if math.isfinite(loss) else f"the loss is {loss}"
        if weights and not found and self.processes.total(float(not are_finite(self.model.parameters()))):
            found = "a weight is not finite"
        if found:
            last = checkpoints.find(self.out, "last")
            good = f". The last good state is in {last}" if last else ""
            advice = "a lower --lr" + ("" if self.config.fused_update else " or --clip-grad 1")
            raise FloatingPointError(f"{found} at step {self.step}: training has diverged; try {advice}{good}")
        return loss

    def _log_training(self, grad_norm: Tensor | None) -> None:
        loss = self._check_finite() / max(1, self._loss_count)
        rates = self.steps.rates()
        values = {"loss": loss, "lr": rates.get("backbone", 0.0), "lr_head": rates.get("head", 0.0)}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm.item()
        wait = round(self.processes.largest(self._waiting.share), 4)
        if self.log is not None:
            speed = round(self.progress.rate, 1) if self.progress.count > self.progress.start else 0.0
            facts = {"epoch": self._epoch, "images_per_s": speed, "data_wait": wait}
            self.log.add("train", self.step, time_s=round(time.time(), 3), **facts, **values)
        self.progress.advance(0, f"loss {loss:.4f}")
        self._loss_sum.zero_()
        self._loss_count, self._waiting = 0, _Waiting()

    def _validation_batches(self) -> Any:
        """The share of the process; of several, as many batches of one size for each, for models that communicate."""
        config, world = self.config, self.processes.world
        sparse = config.metrics == "topk"
        loader = evaluation_loader(
            self.val_set,
            self.num_classes,
            config.batch_size,
            workers=config.workers,
            sparse=sparse,
            share=self.processes.share,
        )
        if world == 1:
            return loader
        count = -(-len(self.val_set) // config.batch_size)  # type: ignore[arg-type]
        nothing = Collate(self.num_classes, sparse=sparse, keep_unknown=True)([])
        return padded_batches(loader, count, config.batch_size // world, nothing, self._image_shape)

    def _validate(self) -> None:
        config = self.config
        model = self.model if self._average is None else self._average
        metrics = new_metrics(config, self.num_classes, self.device, self.source)
        batches, group = self._validation_batches(), self.processes.group
        found = evaluate(model, batches, config, metrics, self.device, self.bad_data, group=group)
        self._share_bad_data()
        self.metrics = self.processes.from_main(lambda: {**found, "step": self.step})
        values = {name: value for name, value in self.metrics.items() if name != "step"}
        if self.log is not None:
            self.log.add("val", self.step, epoch=self._epoch, time_s=round(time.time(), 3), **values)
        main = main_measure(values)
        shown = "  ".join(
            f"{name} {values[name]:.4f}" for name in ("top1", "mAP", "CF1", "OF1", "P@1", "nDCG@5") if name in values
        )
        better = values[main] > self.best.get(main, -1.0)
        self._say(f"step {self.step}: {shown}{'  (best)' if better else ''}")
        if better:
            self.best = dict(self.metrics)
            self._save("best")

    def _share_bad_data(self) -> None:
        """Tells the main process what the others could not read."""
        new = list(self.bad_data.names.items())[self._told :]
        self._told = len(self.bad_data.names)
        for rank, items in enumerate(self.processes.gather(new)):
            if self.processes.is_main and rank != 0:
                self.bad_data.add(BadSample(*item) for item in items)
