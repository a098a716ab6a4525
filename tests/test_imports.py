"""Imports go one way, and `import mlhead` needs neither triton, timm nor the extension."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlhead

ROOT = Path(mlhead.__file__).parent

# Which parts of mlhead a part may import, besides itself; None is everything.
ALLOWED: dict[str, set[str] | None] = {
    "reference": set(),
    "_check": set(),
    "_extension": set(),
    "_backend": {"_extension"},
    "ops": {"reference", "_check", "_backend", "kernels"},
    "losses": {"ops", "_check"},
    "optim": {"ops", "_check"},
    "heads": {"ops", "losses", "_check", "_backend"},
    "testing": {"ops", "reference", "_backend", "_check", "kernels"},
    "info": {"_backend", "_extension"},
    "cli": None,
    "commands": None,
    "__main__": None,
    "__init__": None,
}
SURROUNDINGS = {"ops", "heads", "losses", "optim", "_check", "_backend"}
ONLY_HERE = {"timm": {"backbones", "_timm_rules", "train", "data"}}


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imported(path: Path, package: str) -> set[str]:
    """The parts of mlhead and the outside packages that a file imports, inside functions too."""
    names = set()
    inside = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [package, *inside[: len(inside) - node.level]] if node.level else []
            prefix = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            deep = prefix == package or not node.module
            names |= {f"{prefix}.{alias.name}" for alias in node.names} if deep else {prefix}
    return names


FILES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = _part(path)
    if part == "kernels":  # inside the package once it is installed; checked below
        return
    imported = _imported(path, "mlhead")
    # Names exported from mlhead/__init__.py, such as `from . import record_backends`, count as ops.
    known = {_part(file) for file in FILES} | {"kernels"}
    inside = {name.split(".")[1] for name in imported if name.startswith("mlhead.")}
    parts = {name if name in known else "ops" for name in inside} - {part}
    allowed = ALLOWED.get(part, SURROUNDINGS | {p for p in (_part(f) for f in FILES) if p not in ALLOWED})
    if allowed is not None:
        assert parts <= allowed, f"{path.name} may import {sorted(allowed)}, not {sorted(parts - allowed)}"
    outside = {name.split(".")[0] for name in imported}
    assert "triton" not in outside or part == "testing", "only kernels import triton"
    assert "timm" not in outside or part in ONLY_HERE["timm"], "only backbones and the training loop import timm"


def test_every_package_is_installed() -> None:
    project = ROOT.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("needs pyproject.toml, which is beside the package in a checkout")
    listed = project.read_text().partition("packages = [")[2].partition("]")[0]
    packages = {".".join(file.parent.relative_to(ROOT.parent).parts) for file in FILES if file.name == "__init__.py"}
    assert packages <= {name.strip(' ",') for name in listed.splitlines()}


def test_kernels_import_torch_and_triton_only() -> None:
    import mlhead.kernels

    for path in Path(mlhead.kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                assert node.module.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path}: kernels never import the rest of mlhead"
            elif isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names} for a in node.names)


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r} or name in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}} (blocked by the test)', name=name)
sys.meta_path.insert(0, Block())
import os
os.environ.pop('TRITON_INTERPRET', None)
import mlhead, torch
assert not {{'triton', 'timm'}} & set(sys.modules), 'imported at import'
"""

USE = """
head = mlhead.MLDecoder(16, 30, groups=5, embed_dim=32, num_heads=4, feedforward_dim=32)
head(torch.randn(2, 16, 3, 3)).sum().backward()
mlhead.CSRAHead(16, 30)(torch.randn(2, 16, 3, 3)).sum().backward()
from mlhead.info import report
text = report()
"""


def _run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)


@pytest.mark.parametrize("blocked", ["triton", "timm", "mlhead._extension_that_is_absent"])
def test_works_without(blocked: str) -> None:
    result = _run(BLOCK.format(blocked=[blocked]) + USE + "print(text)")
    assert result.returncode == 0, result.stderr
    assert "reference" in result.stdout


def test_works_without_the_extension() -> None:
    script = BLOCK.format(blocked=["timm"]) + (
        "import mlhead._extension as e\n"
        "e.load_cpu = e.load_cuda = lambda: 'the library is not there (removed by the test)'\n"
    )
    result = _run(script + USE + "print(text)")
    assert result.returncode == 0, result.stderr
    assert "removed by the test" in result.stdout


def test_missing_packages_say_what_to_install() -> None:
    blocked = ["triton", "timm"]
    triton = (
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "mlhead.group_fc(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), backend='triton')"
    )
    result = _run(BLOCK.format(blocked=blocked) + triton)
    assert "the package triton cannot be imported: No module named 'triton'" in result.stderr


def test_ambient_kernels_package_is_not_mistaken(tmp_path: Path) -> None:
    """From a folder that has another package called `kernels`, mlhead still finds its own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('not this one')")
    script = (
        f"import sys; sys.path.insert(1, {str(ROOT.parent)!r}); import mlhead.kernels; print(mlhead.kernels.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) not in result.stdout
