"""`mlhead predict`: the classes in images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlhead._usage import check_folder, usage_fail

from ._options import Commands, add_device, add_weights, new_parser, number


def add(commands: Commands) -> None:
    """Adds its parser."""
    text = "Name the classes in images, and draw where each of them looks."
    parser = new_parser(commands, "predict", text, _predict)
    parser.add_argument("paths", metavar="CHECKPOINT IMAGE", nargs="+", help="the checkpoint, then one or more images")
    parser.add_argument("--checkpoint", help="the checkpoint, if it is not the first of the paths")
    parser.add_argument("--out", default="runs/predict", help="folder for the pictures (default: runs/predict)")
    parser.add_argument("--top", type=number(int), default=5, help="most classes per image (default: 5)")
    shown = "lowest probability that is shown; the best class always is (default: 0.5)"
    parser.add_argument("--threshold", type=number(float), default=0.5, help=shown)
    labels = "a class to show in the place of those that are found, whatever its score; may be repeated"
    parser.add_argument("--label", metavar="NAME", action="append", help=labels)
    add_weights(parser)
    add_device(parser)


def _predict(arguments: argparse.Namespace) -> int:
    from mlhead import inference
    from mlhead.data.loading import BadSample

    paths = [Path(path) for path in arguments.paths]
    checkpoint = Path(arguments.checkpoint) if arguments.checkpoint else paths.pop(0)
    if not paths:
        usage_fail("IMAGE", "at least one image after the checkpoint", "none")
    if arguments.top < 1:
        usage_fail("--top", "at least 1", arguments.top)
    for path in paths:
        if not path.is_file():
            usage_fail("IMAGE", "an existing image file", path)
    check_folder("--out", Path(arguments.out))
    loaded = inference.load_model(checkpoint, device=arguments.device, weights=arguments.weights)
    options = {"top": arguments.top, "threshold": arguments.threshold, "names": arguments.label}
    results = inference.predict_files(loaded, paths, **options)
    out, taken, failed = Path(arguments.out), set[str](), 0
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, BadSample):
            print(f"{result.name}: {result.reason}", file=sys.stderr)
            failed += 1
            continue
        name, number = path.stem, 2
        while name in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name)
        inference.save_prediction(result, out / f"{name}.png", title=str(path))
        labels = ", ".join(f"{label} {score:.3f}" for label, score in zip(result.names, result.scores, strict=True))
        print(f"{path}: {labels}  [{out / name}.png]")
    if failed:
        print(f"{failed} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failed else 0
