"""The papers' result rows as options of a training run: one YAML for each, with the score that the paper reports.

A recipe maps names of `TrainConfig` options to values; beside them it may have `base`, another recipe whose values it
starts from, `paper`, the score, and `notes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlhead._config import TrainConfig, check_names, read_mapping
from mlhead._usage import closest, usage_fail

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """Options of a run, and the row of a paper that they stand for.

    Attributes:
        name: the file's, without its suffix.
        values: options of `TrainConfig`.
        origins: for each of them the name of the recipe that it is from, this one or its base.
        paper: metric, value in percent, and table; None for a recipe of a user.
        notes: what the options cannot say.
    """

    name: str
    values: dict[str, Any]
    origins: dict[str, str]
    paper: dict[str, Any] | None
    notes: str

    def config(self) -> TrainConfig:
        """The options of a run that changes none of them."""
        return TrainConfig(**self.values)

    def score(self) -> str:
        """What the paper reports, in words."""
        return "" if self.paper is None else f"{self.paper['metric']} {self.paper['value']} ({self.paper['table']})"


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Recipe:
    """A recipe by its name or by the path of a YAML file.

    Raises:
        UsageError: there is no such recipe, it has an unknown option, or its base has a base.
    """
    recipe, base = _read(name)
    if base is None:
        return recipe
    below, deeper = _read(base)
    if deeper is not None:
        usage_fail(f"base of --recipe {name}", "a recipe without a base", repr(base))
    return Recipe(
        recipe.name,
        below.values | recipe.values,
        below.origins | recipe.origins,
        recipe.paper,
        recipe.notes or below.notes,
    )


def _read(name: str) -> tuple[Recipe, str | None]:
    """The recipe of one file alone, and the name of its base."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        must = "a recipe of docs/recipes.md or the path of one"
        usage_fail("--recipe", must, repr(name) + closest(name, names()))
    content = read_mapping("--recipe", path)
    base, paper, notes = content.pop("base", None), content.pop("paper", None), content.pop("notes", "")
    source = f"--recipe {name}"
    if not isinstance(base, str | None) or not isinstance(notes, str):
        usage_fail(source, "a mapping with text for base and notes", repr(base if isinstance(notes, str) else notes))
    if paper is not None and not (isinstance(paper, dict) and {*paper} == {"metric", "value", "table"}):
        usage_fail(source, "a mapping with metric, value and table for paper", repr(paper))
    values = check_names(content, source)
    return Recipe(path.stem, values, dict.fromkeys(values, path.stem), paper, " ".join(notes.split())), base


def page() -> str:
    """The tables of docs/recipes.md: of each paper's rows the score, ours, and what cannot be as in the paper."""
    lines = []
    for short, title in (("MLD", "ML-Decoder"), ("CSRA", "CSRA")):
        rows = [recipe for recipe in map(load, names()) if recipe.paper and recipe.paper["table"].startswith(short)]
        lines += [f"## {title}", "", "| recipe | the paper's score | ours | notes |", "|---|---|---|---|"]
        lines += [f"| `{row.name}` | {row.score()} | not run here | {row.notes} |" for row in rows]
        lines.append("")
    return "\n".join(lines)
