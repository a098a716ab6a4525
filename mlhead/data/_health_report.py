"""What `mlhead data check` says: tables for people, plain values for programs, and a list of everything it found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlhead.checkpoints import write_atomically
from mlhead.data._label_picture import draw_labels
from mlhead.visualize import text_table

_NAMED = 3  # of each kind in the text


class Problem(NamedTuple):
    """One thing that was found: its kind, where, and what. `left_out` says whether it costs the set an image."""

    kind: str
    name: str
    reason: str
    left_out: bool


@dataclass
class Report:
    """What a check found.

    Attributes:
        data: the folder.
        layout: name of its layout.
        classes: how many there are.
        splits: the statistics of each split by name; splits of the same images have one entry, such as "val, test".
        decoded: how many images were opened.
        problems: what cannot be used, and what is only worth knowing.
        positives: for each split the number of images of each class.
        labels: for each split the number of labels of each image.
    """

    data: str
    layout: str
    classes: int
    splits: dict[str, dict[str, Any]]
    decoded: int
    problems: list[Problem]
    positives: dict[str, NDArray[np.int64]]
    labels: dict[str, NDArray[np.int64]]

    @property
    def healthy(self) -> bool:
        """Whether everything that the set lists can be used."""
        return not any(problem.left_out for problem in self.problems)

    def counts(self, *, left_out: bool) -> dict[str, int]:
        """How many problems there are of each kind."""
        return dict(Counter(p.kind for p in self.problems if p.left_out == left_out).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        facts = {name: getattr(self, name) for name in ("data", "layout", "classes", "decoded", "healthy", "splits")}
        return {**facts, "bad": self.counts(left_out=True), "notes": self.counts(left_out=False)}

    def write(self, out: Path) -> list[Path]:
        """Writes report.json, problems.txt (kind, name, reason) and labels.png into a folder; returns the paths."""
        lines = [f"{p.kind}\t{p.name}\t{p.reason}\n" for p in sorted(self.problems, key=lambda p: not p.left_out)]
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_atomically(out / "report.json", lambda file: file.write(text.encode()))
        write_atomically(out / "problems.txt", lambda file: file.write("".join(lines).encode("utf-8", "replace")))
        if not self.splits:
            return [out / "report.json", out / "problems.txt"]
        title = f"{self.data}: {self.classes} classes"
        draw_labels(self.positives, self.labels, out / "labels.png", title=title)
        return [out / "report.json", out / "problems.txt", out / "labels.png"]

    def text(self) -> str:
        """Tables for people."""
        lines = [f"{self.data}: layout {self.layout}, {self.classes} classes, {self.decoded} images decoded", ""]
        if self.splits:
            rows = [["", *self.splits, ""]]
            rows += [[title, *(show(facts) for facts in self.splits.values()), ""] for title, show in _ROWS.items()]
            lines += [text_table(rows), ""]
        for left_out, title in ((True, "left out"), (False, "worth knowing")):
            for kind, count in self.counts(left_out=left_out).items():
                named = [p for p in self.problems if p.kind == kind and p.left_out == left_out]
                lines += [f"{title}: {count} {kind}", *(f"  {p.name}: {p.reason}" for p in named[:_NAMED])]
                lines += ["  ..."] * (count > _NAMED)
        lines.append("healthy" if self.healthy else "not healthy: what is left out is not used")
        return "\n".join(lines).encode("utf-8", "replace").decode()


def _three(counts: Mapping[str, float]) -> str:
    return f"{counts['min']:,} / {counts['median']:,g} / {counts['max']:,}"


_ROWS: dict[str, Any] = {
    "images": lambda facts: f"{facts['images']:,}",
    "images without labels": lambda facts: f"{facts['without_labels']:,}",
    "classes without images": lambda facts: f"{facts['classes_without_images']:,}",
    "images per class, min / median / max": lambda facts: _three(facts["images_per_class"]),
    "labels per image, min / median / max": lambda facts: _three(facts["labels_per_image"]),
    "labels per image, mean": lambda facts: f"{facts['mean_labels']:.2f}",
    "most frequent / least frequent class": lambda facts: f"{facts['imbalance']:,.1f}" if facts["imbalance"] else "-",
    "share of positives": lambda facts: f"{facts['share_of_positives']:.3%}",
    "verified negatives": lambda facts: f"{facts['verified_negatives']:,}",
    "unknown": lambda facts: f"{facts['unknown']:,}",
}
