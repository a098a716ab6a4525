"""The `mlhead` command. Mistakes are answered by one line that names the argument, and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from mlhead import __version__
from mlhead._config import TrainConfig, flag
from mlhead._usage import UsageError, closest
from mlhead.commands import COMMANDS


class _Parser(argparse.ArgumentParser):
    """Prints one line for a mistake, without the usage of every option before it."""

    def error(self, message: str) -> NoReturn:
        _leave_to_first()
        self.exit(2, f"{self.prog}: error: {message}\n")


def _leave_to_first() -> None:
    """Under torchrun, has the first process alone say what is wrong with the command line, which is the same in all."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(20.0)  # torchrun ends this one as soon as the first has gone
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="mlhead", description="Fused classification heads for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mlhead {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a failure, 2 for a mistake in the arguments, 130 for Ctrl-C."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    name = f"mlhead {arguments.command}"
    if unknown:
        known = [flag(item.name) for item in dataclasses.fields(TrainConfig)]
        hint = closest(unknown[0].partition("=")[0], known) if arguments.command == "train" else ""
        _leave_to_first()
        print(
            f"{name}: error: {unknown[0]} must be an option or argument of {name}{hint}; see {name} --help",
            file=sys.stderr,
        )
        return 2
    if arguments.command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
        _leave_to_first()
        print(
            f"{name}: error: it runs in one process, without torchrun, got {os.environ['WORLD_SIZE']}", file=sys.stderr
        )
        return 2
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
