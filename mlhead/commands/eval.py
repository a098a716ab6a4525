"""`mlhead eval`: a checkpoint measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._options import Commands, add_device, add_options, add_split, add_weights, given_options, new_parser

# The options of training that also make sense here.
OPTIONS = (
    "data",
    "layout",
    "voc_difficult",
    "labels",
    "val_labels",
    "image_column",
    "label_column",
    "label_delimiter",
    "on_bad_data",
    "val_length",
    "batch_size",
    "metrics",
    "workers",
    "amp",
    "seed",
)


def add(commands: Commands) -> None:
    """Adds its parser."""
    parser = new_parser(commands, "eval", "Measure a checkpoint on its own data or on other data.", _eval)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best or last of a run, or what export wrote")
    add_split(parser, None, "test, or val of data without test images")
    add_weights(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    add_options(parser, OPTIONS, of_run=True)


def _eval(arguments: argparse.Namespace) -> int:
    import json

    from mlhead import inference

    result = inference.evaluate_checkpoint(
        Path(arguments.checkpoint),
        split=arguments.split,
        changes=given_options(arguments),
        device=arguments.device,
        weights=arguments.weights,
    )
    if arguments.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for name, value in result.items():
            print(f"{name:{width}} {value:{'d' if isinstance(value, int) else '.4f'}}")
    return 0
