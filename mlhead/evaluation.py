"""Measuring a model on batches, and what it shares with training: the device, the layout of images, mixed precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlhead import building
from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._usage import usage_fail
from mlhead.data.loading import Batch
from mlhead.data.reporting import BadDataLog
from mlhead.metrics import MultiLabelMetrics, ZeroShotMetrics
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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Any,
    config: TrainConfig,
    metrics: MultiLabelMetrics | ZeroShotMetrics,
    device: torch.device,
    bad_data: BadDataLog,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The metrics of a model over batches; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    for batch in batches:
        bad_data.add(batch.bad)
        if len(batch.images):
            images, targets = to_device(batch, config, device)
            if isinstance(targets, SparseTargets):
                targets = targets.to_dense()
            with autocast(config, device):
                logits = model(images)
            metrics.update(building.scores_as_logits(config, logits.float()), targets)
        if progress is not None:
            progress.advance()
    model.train(was_training)
    return metrics.compute()


def to_device(batch: Batch, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor | SparseTargets]:
    """Images and targets on the device, the images in the order of axes that the run uses."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    images = batch.images.to(device, non_blocking=True, memory_format=layout)
    return images, batch.targets.to(device, non_blocking=True)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context of mixed precision, which does nothing for --amp none."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[config.amp], enabled=config.amp != "none")
