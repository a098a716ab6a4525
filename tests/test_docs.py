"""The examples of README.md and docs/ run: the blocks of a page in turn, with what its prose takes for granted."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import mlhead
from tests.several_processes import environment, torchrun

timm = pytest.importorskip("timm")

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "README.md", *ROOT.glob("docs/*.md")))


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def for_readme() -> dict[str, Any]:
    torch.save(
        mlhead.public_state_dict(mlhead.MLDecoder(64, 80, embed_dim=32, num_heads=4)), "tresnet_m_open_images.pth"
    )
    h, weight, bias = torch.randn(2, 4, 8), torch.randn(4, 8, 5), torch.randn(20)
    return {"h": h, "weight": weight, "bias": bias, "images": torch.randn(2, 3, 64, 64)}


class Strided(torch.nn.Conv2d):
    """A backbone of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__(3, width, 4, stride=4)
        self.num_features = width
        self.forward_features = self.forward


def for_loss() -> dict[str, Any]:
    """The classes are the million of the page; all else is small."""
    C, D, G = 1_000_000, 4, 100
    shapes = {
        "x": (2, D),
        "weight": (C, D),
        "bias": (C,),
        "h": (2, G, D),
        "groups": (G, D, C // G),
        "tokens": (2, 3, D),
    }
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
    model, counts = mlhead.attach_head(Strided(D), "gap", C), torch.randint(0, 50, (C,))
    more = {"heads": tensors["weight"][None], "labels": torch.tensor([5, 6]), "model": model}
    more["images"] = torch.randn(2, 3, 8, 8)
    return {**tensors, **more, "mlhead": mlhead, "torch": torch, "counts": counts, "num_images": 1000}


def for_zero_shot() -> dict[str, Any]:
    words = ("dog", "traffic", "light", "cat")
    Path("glove.6B.300d.txt").write_text("".join(f"{w} {' '.join(['0.5'] * 300)}\n" for w in words))
    return {}


GIVEN = {"README.md": for_readme, "docs/loss.md": for_loss, "docs/zero_shot.md": for_zero_shot}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group that is no more than this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def here(code: str) -> str:
    """The code without what is not at hand: eight GPUs, weights to download."""
    return code.replace('"cuda", (8,)', '"cpu", (1,)').replace(", pretrained=True", "")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != "docs/scale.md"])
@pytest.mark.usefixtures("one_process")
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page]() if page in GIVEN else {"timm": timm, "torch": torch}
    for number, code in enumerate(blocks(page)):
        exec(compile(here(code), f"{page}, block {number}", "exec"), names)


def test_the_script_for_several_devices_runs(tmp_path: Path) -> None:
    (code,) = blocks("docs/scale.md")
    (tmp_path / "classes.py").write_text(code)
    command = [*torchrun(2), str(tmp_path / "classes.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"step \d: loss (\S+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_every_command_named_is_one() -> None:
    """`mlhead COMMAND` and `make TARGET`, in fenced blocks."""
    from mlhead.cli import build_parser

    actions = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            for command in re.findall(r"^(?:torchrun .*-m )?mlhead ([a-z-]+)", block, re.MULTILINE):
                assert command in actions, (page, command)
            for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
                assert target in targets, (page, target)
