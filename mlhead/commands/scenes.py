"""`mlhead scenes`: the scenes as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlhead._config import TrainConfig
from mlhead._usage import usage_fail

from ._options import Commands, add_options, add_split, given_options, new_parser, number


def add(commands: Commands) -> None:
    """Adds its parser."""
    text = "Write scenes of handwritten numbers as images with a CSV of labels."
    parser = new_parser(commands, "scenes", text, _scenes)
    parser.add_argument("folder", metavar="FOLDER", help="gets images/ and labels.csv")
    parser.add_argument("--count", type=number(int), default=100, help="how many (default: 100)")
    add_split(parser, "test", "test")
    add_options(parser, ("num_classes", "image_size", "seed"))


def _scenes(arguments: argparse.Namespace) -> int:
    from mlhead.data.export import write_scenes

    given = given_options(arguments)
    config = TrainConfig(**given)
    if arguments.count < 1:
        usage_fail("--count", "at least 1", arguments.count)
    folder = Path(arguments.folder)
    write_scenes(
        folder,
        arguments.count,
        split=arguments.split,
        num_classes=config.num_classes,
        size=config.image_size,
        seed=config.seed,
    )
    print(f"{arguments.count} scenes in {folder / 'images'}, labels in {folder / 'labels.csv'}")
    return 0
