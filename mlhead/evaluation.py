"""Measuring a model on batches, and what it shares with training: the device, the layout of images, mixed precision."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlhead import building
from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._usage import usage_fail
from mlhead.data.listing import ListSource
from mlhead.data.loading import Batch
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import Source
from mlhead.metrics import (
    TOP_KS,
    MultiLabelMetrics,
    SingleLabelMetrics,
    TopKAccuracy,
    TopKMetrics,
    ZeroShotMetrics,
    propensities,
)
from mlhead.ops import SparseTargets

AMP_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that --device names.

    Raises:
        UsageError: no such device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        usage_fail("--device", "'auto', 'cpu', 'cuda' or 'cuda:<number>'", repr(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        usage_fail("--device", f"one of the {torch.cuda.device_count()} CUDA devices of this machine", repr(name))
    return device


def new_metrics(
    config: TrainConfig, num_classes: int, device: torch.device, source: Source
) -> MultiLabelMetrics | TopKMetrics:
    """What --metrics asks for, over C classes that are all trained; of lists of images with propensities."""
    if config.metrics == "topk":
        ks = [k for k in TOP_KS if k <= num_classes]
        return TopKMetrics(ks, propensities=_propensities(source, num_classes), device=device)
    return (SingleLabelMetrics if source.single_label else MultiLabelMetrics)(num_classes, device=device)


def _propensities(source: Source, num_classes: int) -> Tensor | None:
    """By the labels of the training images, where these are listed; scenes without end have no such counts."""
    listing = source.splits.get("train") if isinstance(source, ListSource) else None
    if listing is None or len(listing) < 3:
        return None
    return propensities(torch.from_numpy(listing.positives(num_classes)), len(listing))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Any,
    config: TrainConfig,
    metrics: MultiLabelMetrics | ZeroShotMetrics | TopKAccuracy | TopKMetrics,
    device: torch.device,
    bad_data: BadDataLog,
    progress: Progress | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    times: dict[str, float] | None = None,
) -> dict[str, float]:
    """The metrics of a model over batches; the model's mode is put back afterwards.

    Args:
        model: gives logits (B, C), or for `TopKMetrics` has `topk`.
        batches: of `Batch`, targets dense or sparse; sparse for `TopKMetrics`.
        config: the options of the run.
        metrics: what is measured; may have seen other batches before.
        device: of the model.
        bad_data: gets the samples that could not be read.
        progress: advances by one for each batch.
        group: the processes that each see some of the batches, all of which call this; None where this one sees all.
        times: where seconds are added to the entries "data" (waiting for batches), "model" and "metrics". On a GPU
            they are true because the device is waited for after each, which takes a little time itself.
    """
    lap = _Laps(times, device)
    with _evaluating(model):
        for batch in batches:
            lap("data")
            bad_data.add(batch.bad)
            if len(batch.images):
                images, targets = to_device(batch, config, device)
                if isinstance(metrics, TopKMetrics):
                    with autocast(config, device):
                        classes = model.topk(images, max(metrics.ks))[1]  # type: ignore[operator]
                    lap("model")
                    assert isinstance(targets, SparseTargets)
                    metrics.update(*_real(classes, targets, batch.real))
                else:
                    with autocast(config, device):
                        logits = model(images)
                    logits = building.scores_as_logits(config, logits.float())
                    lap("model")
                    metrics.update(logits, targets)
                lap("metrics")
            if progress is not None:
                progress.advance()
    lap("data")
    found = metrics.compute(group)
    lap("metrics")
    return found


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards in its own."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _real(classes: Tensor, targets: SparseTargets, real: int | None) -> tuple[Tensor, SparseTargets]:
    """Those of the images that are not there to fill a batch; these have no labels."""
    if real is None:
        return classes, targets
    return classes[:real], targets._replace(offsets=targets.offsets[: real + 1])


class _Laps:
    """Adds the seconds since the call before to an entry of `times`, if there is one."""

    def __init__(self, times: dict[str, float] | None, device: torch.device) -> None:
        self.times, self.device = times, device
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.times is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self.last
        self.last = now


def to_device(batch: Batch, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor | SparseTargets]:
    """Images and targets on the device, the images in the order of axes that the run uses."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    images = batch.images.to(device, non_blocking=True, memory_format=layout)
    return images, batch.targets.to(device, non_blocking=True)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context of mixed precision, which does nothing for --amp none."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[config.amp], enabled=config.amp != "none")
