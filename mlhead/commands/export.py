"""`mlhead export`: a checkpoint as one file of weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._options import Commands, add_weights, new_parser


def add(commands: Commands) -> None:
    """Adds its parser."""
    text = "Write the model of a checkpoint as one safetensors file, which eval and predict take too."
    parser = new_parser(commands, "export", text, _export)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best or last of a run, a file or a folder")
    parser.add_argument("out", metavar="OUT", help="the file, NAME.safetensors")
    add_weights(parser)


def _export(arguments: argparse.Namespace) -> int:
    from mlhead import inference

    out = Path(arguments.out)
    inference.export_model(Path(arguments.checkpoint), out, weights=arguments.weights)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0
