"""`mlhead data`: a data set looked at."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlhead._config import FOLDER_LABELS, TrainConfig
from mlhead._usage import check_folder, usage_fail

from ._options import Commands, add_options, given_options, new_parser

# The options of training that also make sense here.
OPTIONS = (*FOLDER_LABELS, "workers")


def add(commands: Commands) -> None:
    """Adds its parser."""
    text = "Look at a data set."
    parser = commands.add_parser("data", help=text, description=text, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "Report the health of a data set, in any layout, and the statistics of its labels; exit code 1 if it is bad."
    parser = new_parser(actions, "check", text, _check)
    parser.add_argument("path", metavar="PATH", help="the folder")
    parser.add_argument(
        "--images", default="1000", metavar="N", help="how many of each split are decoded, or 'all' (default: 1000)"
    )
    parser.add_argument(
        "--out", default="runs/check", help="folder for the report, the list and the picture (default: runs/check)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    add_options(parser, OPTIONS)


def _check(arguments: argparse.Namespace) -> int:
    import json

    from mlhead.data import check

    images = arguments.images
    if images != "all" and not images.isdecimal():
        usage_fail("--images", "a whole number or 'all'", repr(images))
    config = TrainConfig(data=arguments.path, **given_options(arguments))
    check_folder("--out", Path(arguments.out))
    report = check.check(
        config, images=None if images == "all" else int(images), say=lambda line: print(line, file=sys.stderr)
    )
    paths = report.write(Path(arguments.out))
    print(json.dumps(report.to_dict()) if arguments.json else report.text())
    if not arguments.json:
        print(f"written: {', '.join(map(str, paths))}")
    return 0 if report.healthy else 1
