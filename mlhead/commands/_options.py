"""What the parsers of the commands share: options of training as flags, and options that several commands have."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from mlhead import _config
from mlhead._config import TrainConfig, flag

# What `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def new_parser(
    commands: Commands, name: str, text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """The parser of a command, whose arguments `run` gets; it returns the exit code."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def add_split(parser: argparse.ArgumentParser, default: str | None, text: str) -> None:
    """Which images."""
    parser.add_argument("--split", choices=("train", "val", "test"), default=default, help=f"(default: {text})")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Which weights of a checkpoint."""
    parser.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="which weights, if it has both"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model runs."""
    parser.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")


def number(kind: type) -> Callable[[str], Any]:
    """Reads a number, for argparse."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None

    return convert


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] | None = None, *, of_run: bool = False) -> None:
    """One flag for each field of TrainConfig; only flags that are given appear in the result.

    Args:
        parser: gets the flags.
        names: of the fields, or None for all.
        of_run: whether a flag that is not given has the value that a run had.
    """
    for item in dataclasses.fields(TrainConfig):
        if names is not None and item.name not in names:
            continue
        kind, _ = _config.field_type(item)
        default = None if item.default is dataclasses.MISSING else item.default
        text = item.metadata["help"].replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": item.name}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            options |= {"action": "append", "metavar": "NAME=VALUE"}
        else:
            options |= {"type": kind if kind is str else number(kind), "metavar": kind.__name__.upper()}
            if choices := item.metadata["choices"]:
                options["metavar"] = "{" + ",".join(choices) + "}"
        if of_run:
            text += " (default: as in training)"
        elif default is not None:
            text += f" (default: {default})"
        parser.add_argument(flag(item.name), help=text, **options)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of TrainConfig that the command line gave."""
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    for name in ("backbone_opt", "head_opt", "loss_opt", "optimizer_opt"):
        if name in values:
            values[name] = _config.parse_pairs(flag(name), values[name])
    return values
