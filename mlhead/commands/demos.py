"""`mlhead demo`, `demo-zsl` and `demo-million`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._options import Commands, new_parser, number


def add(commands: Commands) -> None:
    """Adds their parsers."""
    text = "Train GAP, CSRA and ML-Decoder heads on the same task and compare them, on two cores in minutes."
    parser = new_parser(commands, "demo", text, _demo)
    parser.add_argument("--out", default="runs/demo", help="folder for the pictures and the table (default: runs/demo)")
    parser.add_argument(
        "--steps", type=number(int), default=None, help="steps for each head, in place of the demo's own"
    )
    parser.add_argument("--seed", type=number(int), default=0, help="(default: 0)")

    text = "Train heads of word vectors, and find numbers that no training scene shows, in minutes."
    parser = new_parser(commands, "demo-zsl", text, _demo_zsl)
    parser.add_argument("--out", default="runs/demo-zsl", help="folder for table and pictures (default: runs/demo-zsl)")
    parser.add_argument("--steps", type=number(int), default=None, help="of each run, in place of the demo's own")
    parser.add_argument("--seeds", type=number(int), default=None, help="how many, in place of the demo's own")
    parser.add_argument("--jobs", type=number(int), default=None, help="runs at a time (default: one for each core)")

    text = "Train a head of a million classes on the CPU, with the loss in the head, in minutes."
    parser = new_parser(commands, "demo-million", text, _demo_million)
    parser.add_argument("--out", default="runs/demo-million", help="folder for the table (default: runs/demo-million)")
    parser.add_argument("--classes", type=number(int), default=1_000_000, help="(default: 1000000)")
    parser.add_argument("--width", type=number(int), default=64, help="of the features (default: 64)")
    parser.add_argument("--batch-size", type=number(int), default=512, help="(default: 512)")
    parser.add_argument("--steps", type=number(int), default=None, help="in place of the demo's own")
    parser.add_argument("--seed", type=number(int), default=0, help="(default: 0)")


def _demo(arguments: argparse.Namespace) -> int:
    from mlhead import demo

    demo.run(Path(arguments.out), steps=arguments.steps, seed=arguments.seed)
    return 0


def _demo_zsl(arguments: argparse.Namespace) -> int:
    from mlhead import demo_zero_shot

    demo_zero_shot.run(Path(arguments.out), steps=arguments.steps, seeds=arguments.seeds, jobs=arguments.jobs)
    return 0


def _demo_million(arguments: argparse.Namespace) -> int:
    from mlhead import million

    options = {name: getattr(arguments, name) for name in ("classes", "width", "batch_size", "steps", "seed")}
    million.run(Path(arguments.out), **options)
    return 0
