"""Scenes as ordinary files: a small image folder with labels, to try `--data FOLDER` and `mlhead predict` with."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from mlhead._usage import require
from mlhead.checkpoints import write_atomically
from mlhead.data.scenes import Scenes


def write_scenes(
    folder: Path, count: int, *, split: str = "test", num_classes: int = 100, size: int | None = None, seed: int = 0
) -> None:
    """Writes the first `count` scenes of a split as images/00000.png, ... and labels.csv."""
    pil = require("PIL.Image", "mlhead scenes")
    scenes = Scenes(split, num_classes=num_classes, size=size, seed=seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "labels"])
    for serial, sample in enumerate(scenes.__getitems__(range(count))):
        name = f"{serial:05d}.png"
        pil.fromarray(scenes.to_picture(sample.image)[..., 0]).save(folder / "images" / name)
        writer.writerow([name, ";".join(scenes.class_names[label] for label in sample.labels)])
    write_atomically(folder / "labels.csv", lambda file: file.write(table.getvalue().encode()))
