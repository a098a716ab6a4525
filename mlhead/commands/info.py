"""`mlhead info`: versions, devices, backends."""

from __future__ import annotations

import argparse

from ._options import Commands, new_parser


def add(commands: Commands) -> None:
    """Adds its parser."""
    new_parser(commands, "info", "Versions, devices, and which backends are there and why not.", _info)


def _info(arguments: argparse.Namespace) -> int:
    from mlhead import info

    print(info.report())
    return 0
