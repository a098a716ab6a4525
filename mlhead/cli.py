"""The `mlhead` command. Mistakes are answered by one line that names the argument, and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlhead import _config, recipes
from mlhead._config import TrainConfig, flag
from mlhead._usage import UsageError, closest, usage_fail
from mlhead.recipes import Recipe

# The options of training that also make sense for `mlhead eval`.
_EVAL_OPTIONS = (
    "data",
    "layout",
    "voc_difficult",
    "labels",
    "image_column",
    "label_column",
    "label_delimiter",
    "on_bad_data",
    "val_length",
    "batch_size",
    "workers",
    "amp",
    "seed",
)

# Those for `mlhead data check`.
_CHECK_OPTIONS = (
    "layout",
    "labels",
    "val_labels",
    "image_column",
    "label_column",
    "label_delimiter",
    "classes",
    "val_fraction",
    "voc_difficult",
    "workers",
)


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


def _number(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {words}, got {text!r}") from None

    return convert


def _add_options(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """One flag for each field of TrainConfig; only flags that are given appear in the result."""
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
            options |= {"type": kind if kind is str else _number(kind), "metavar": kind.__name__.upper()}
            if choices := item.metadata["choices"]:
                options["metavar"] = "{" + ",".join(choices) + "}"
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(flag(item.name), help=text, **options)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of TrainConfig that the command line gave."""
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    for name in ("backbone_opt", "head_opt", "loss_opt", "optimizer_opt"):
        if name in values:
            values[name] = _config.parse_pairs(flag(name), values[name])
    return values


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="mlhead", description="Fused classification heads for PyTorch.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    sub = add("train", "Train a backbone with a head; without options, on scenes of handwritten numbers.")
    sub.add_argument("--recipe", metavar="NAME", help="a paper's options: a recipe of docs/recipes.md, or a YAML file")
    sub.add_argument("--config", metavar="FILE", help="YAML or JSON file of options; wins over --recipe, flags over it")
    sub.add_argument("--resume", metavar="PATH", help="go on with a run: its folder, or a checkpoint in it")
    sub.add_argument("--overwrite", action="store_true", help="allow --out to hold a run already; it is replaced")
    sub.add_argument(
        "--dry-run", action="store_true", help="print all options, parameters, FLOPs and memory; train nothing"
    )
    _add_options(sub)

    sub = add("eval", "Measure a checkpoint on its own data or on other data.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="best or last of a run, or what export wrote")
    sub.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
    sub.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="which weights, if it has both"
    )
    sub.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    sub.add_argument("--json", action="store_true", help="print JSON in place of a table")
    _add_options(sub, _EVAL_OPTIONS)

    sub = add("export", "Write the model of a checkpoint as one safetensors file, which eval and predict take too.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="best or last of a run, a file or a folder")
    sub.add_argument("out", metavar="OUT", help="the file, NAME.safetensors")
    sub.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="which weights, if it has both"
    )

    sub = add("predict", "Name the classes in images, and draw where each of them looks.")
    sub.add_argument("paths", metavar="CHECKPOINT IMAGE", nargs="+", help="the checkpoint, then one or more images")
    sub.add_argument("--checkpoint", help="the checkpoint, if it is not the first of the paths")
    sub.add_argument("--out", default="runs/predict", help="folder for the pictures (default: runs/predict)")
    sub.add_argument("--top", type=_number(int), default=5, help="most classes per image (default: 5)")
    sub.add_argument("--threshold", type=_number(float), default=0.5, help="least probability (default: 0.5)")
    sub.add_argument(
        "--weights", choices=("auto", "ema", "model"), default="auto", help="which weights, if it has both"
    )
    sub.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")

    sub = add("scenes", "Write scenes of handwritten numbers as images with a CSV of labels.")
    sub.add_argument("folder", metavar="FOLDER", help="gets images/ and labels.csv")
    sub.add_argument("--count", type=_number(int), default=100, help="how many (default: 100)")
    sub.add_argument("--split", choices=("train", "val", "test"), default="test", help="(default: test)")
    _add_options(sub, ("num_classes", "image_size", "seed"))

    sub = add("data", "Look at a data set.")
    text = "Report the health of a data set, in any layout, and the statistics of its labels; exit code 1 if it is bad."
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    sub = actions.add_parser("check", help=text, description=text, allow_abbrev=False)
    sub.add_argument("path", metavar="PATH", help="the folder")
    sub.add_argument(
        "--images", default="1000", metavar="N", help="how many of each split are decoded, or 'all' (default: 1000)"
    )
    sub.add_argument(
        "--out", default="runs/check", help="folder for the report, the list and the picture (default: runs/check)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON in place of tables")
    _add_options(sub, _CHECK_OPTIONS)

    sub = add(
        "demo", "Train GAP, CSRA and ML-Decoder heads on the same task and compare them, on two cores in minutes."
    )
    sub.add_argument("--out", default="runs/demo", help="folder for the pictures and the table (default: runs/demo)")
    sub.add_argument("--steps", type=_number(int), default=None, help="steps for each head, in place of the demo's own")
    sub.add_argument("--seed", type=_number(int), default=0, help="(default: 0)")

    sub = add("demo-zsl", "Train heads of word vectors, and find numbers that no training scene shows, in minutes.")
    sub.add_argument("--out", default="runs/demo-zsl", help="folder for table and pictures (default: runs/demo-zsl)")
    sub.add_argument("--steps", type=_number(int), default=None, help="of each run, in place of the demo's own")
    sub.add_argument("--seeds", type=_number(int), default=None, help="how many, in place of the demo's own")
    sub.add_argument("--jobs", type=_number(int), default=None, help="runs at a time (default: one for each core)")

    sub = add("demo-million", "Train a head of a million classes on the CPU, with the loss in the head, in minutes.")
    sub.add_argument("--out", default="runs/demo-million", help="folder for the table (default: runs/demo-million)")
    sub.add_argument("--classes", type=_number(int), default=1_000_000, help="(default: 1000000)")
    sub.add_argument("--width", type=_number(int), default=64, help="of the features (default: 64)")
    sub.add_argument("--batch-size", type=_number(int), default=512, help="(default: 512)")
    sub.add_argument("--steps", type=_number(int), default=None, help="in place of the demo's own")
    sub.add_argument("--seed", type=_number(int), default=0, help="(default: 0)")

    add("info", "Versions, devices, and which backends are there and why not.")
    return parser


def _resolve(
    arguments: argparse.Namespace, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str], Recipe | None]:
    """Options by --recipe, over them --config, over both the flags; where each is from; and the recipe."""
    recipe = recipes.load(arguments.recipe) if arguments.recipe else None
    saved = _config.load_config(Path(arguments.config)) if arguments.config else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if recipe is not None:
        values |= recipe.values
        origins |= {name: f"recipe {source}" for name, source in recipe.origins.items()}
    values |= saved | given
    origins |= dict.fromkeys(saved, f"--config {arguments.config}") | {name: flag(name) for name in given}
    return values, origins, recipe


def _train(arguments: argparse.Namespace) -> int:
    from mlhead.distributed import launched

    with launched() as processes:
        return _train_here(arguments, processes.is_main)


def _train_here(arguments: argparse.Namespace, is_main: bool) -> int:
    from mlhead import checkpoints
    from mlhead import train as training
    from mlhead.metrics import main_measure

    given = _given(arguments)
    if arguments.resume is not None:
        for name in ("config", "recipe", "dry_run"):
            if value := getattr(arguments, name):
                usage_fail(flag(name), "absent on --resume, which goes on with the saved options", value)
        summary = training.resume(Path(arguments.resume), given)
    else:
        values, origins, recipe = _resolve(arguments, given)
        if recipe is not None and not arguments.dry_run and "data" not in values:
            usage_fail("--data", "given with --recipe", None)
        config = TrainConfig(**values)
        if arguments.dry_run:
            from mlhead import dry_run

            if is_main:
                print(dry_run.report(config, origins, recipe))
            return 0
        summary = training.train(config, overwrite=arguments.overwrite)
    if not is_main:
        return 0
    best, path = summary.best, checkpoints.find(summary.out, "best")
    assert path is not None
    name = main_measure(best)
    found = f"best {name} {best[name]:.4f} at step {best['step']} of {summary.steps}: {path}"
    print(f"{found}  ({summary.data_wait:.1%} of the time waiting for data)")
    if summary.zero_shot:
        from mlhead import inference

        # Validation images show seen classes only, so the best checkpoint was chosen without any unseen one.
        scores = inference.evaluate_checkpoint(path)
        print("on the test images, of unseen classes (ZSL) and of all (GZSL):")
        for which in ("ZSL", "GZSL"):
            shown = (f"{name} {scores[f'{which}_{name}']:.4f}" for name in ("mAP", "F1@3", "F1@5"))
            print(f"  {which:4}  {'  '.join(shown)}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    import json

    from mlhead import inference

    result = inference.evaluate_checkpoint(
        Path(arguments.checkpoint),
        split=arguments.split,
        changes=_given(arguments),
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


def _export(arguments: argparse.Namespace) -> int:
    from mlhead import inference

    out = Path(arguments.out)
    inference.export_model(Path(arguments.checkpoint), out, weights=arguments.weights)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0


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
    loaded = inference.load_model(checkpoint, device=arguments.device, weights=arguments.weights)
    results = inference.predict_files(loaded, paths, top=arguments.top, threshold=arguments.threshold)
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


def _scenes(arguments: argparse.Namespace) -> int:
    from mlhead.data.export import write_scenes

    given = _given(arguments)
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


def _data(arguments: argparse.Namespace) -> int:
    import json

    from mlhead.data import check

    images = arguments.images
    if images != "all" and not images.isdecimal():
        usage_fail("--images", "a whole number or 'all'", repr(images))
    config = TrainConfig(data=arguments.path, **_given(arguments))
    report = check.check(
        config, images=None if images == "all" else int(images), say=lambda line: print(line, file=sys.stderr)
    )
    paths = report.write(Path(arguments.out))
    print(json.dumps(report.to_dict()) if arguments.json else report.text())
    if not arguments.json:
        print(f"written: {', '.join(map(str, paths))}")
    return 0 if report.healthy else 1


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


def _info(arguments: argparse.Namespace) -> int:
    from mlhead import info

    print(info.report())
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "eval": _eval,
    "export": _export,
    "predict": _predict,
    "scenes": _scenes,
    "data": _data,
    "demo": _demo,
    "demo-million": _demo_million,
    "demo-zsl": _demo_zsl,
    "info": _info,
}


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
    try:
        return _COMMANDS[arguments.command](arguments)
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
