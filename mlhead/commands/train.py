"""`mlhead train`: a run, or with --dry-run what it would be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlhead import _config, recipes
from mlhead._config import TrainConfig, flag
from mlhead._usage import usage_fail
from mlhead.recipes import Recipe

from ._options import Commands, add_options, given_options, new_parser

if TYPE_CHECKING:
    from mlhead.distributed import Processes


def add(commands: Commands) -> None:
    """Adds its parser."""
    text = "Train a backbone with a head; without options, on scenes of handwritten numbers."
    parser = new_parser(commands, "train", text, _train)
    parser.add_argument(
        "--recipe", metavar="NAME", help="a paper's options: a recipe of docs/recipes.md, or a YAML file"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON file of options; wins over --recipe, flags over it"
    )
    parser.add_argument("--resume", metavar="PATH", help="go on with a run: its folder, or a checkpoint in it")
    parser.add_argument("--overwrite", action="store_true", help="allow --out to hold a run already; it is replaced")
    parser.add_argument(
        "--dry-run", action="store_true", help="print all options, parameters, FLOPs and memory; train nothing"
    )
    add_options(parser)


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


def _check_used(config: TrainConfig, given: dict[str, Any], dry_run: bool) -> None:
    """That the run uses every flag that was given."""
    scenes = config.data == "scenes"
    for name in _config.FOLDER_ONLY if scenes else _config.SCENES_ONLY:
        # A dry run asks for the number of classes where the folder is not there.
        if name in given and not (dry_run and name == "num_classes"):
            must = "absent without --data FOLDER" if scenes else "absent with --data FOLDER: it is of the scenes"
            usage_fail(flag(name), must, given[name])
    if given.get("steps") is not None and "epochs" in given:
        usage_fail("--epochs", "absent with --steps, which takes its place", given["epochs"])


def _train(arguments: argparse.Namespace) -> int:
    from mlhead.distributed import launched

    with launched() as processes:
        return _train_here(arguments, processes)


def _train_here(arguments: argparse.Namespace, processes: Processes) -> int:
    from mlhead import checkpoints
    from mlhead import train as training
    from mlhead.metrics import main_measure

    given = given_options(arguments)
    if arguments.resume is not None:
        for name in ("config", "recipe", "dry_run", "overwrite"):
            if value := getattr(arguments, name):
                usage_fail(flag(name), "absent on --resume, which goes on with the saved options", value)
        summary = training.resume(Path(arguments.resume), given)
    else:
        values, origins, recipe = _resolve(arguments, given)
        if recipe is not None and not arguments.dry_run and "data" not in values:
            usage_fail("--data", "given with --recipe", None)
        config = TrainConfig(**values)
        _check_used(config, given, arguments.dry_run)
        if arguments.dry_run:
            from mlhead import dry_run

            if processes.is_main:
                print(dry_run.report(config, origins, recipe, processes=processes.world))
            return 0
        summary = training.train(config, overwrite=arguments.overwrite)
    if not processes.is_main:
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
