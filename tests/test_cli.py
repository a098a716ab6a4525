"""The command line: every command runs, a mistake is one line with exit code 2, nothing heavy is imported early."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlhead
from mlhead import cli

for package in ("timm", "torchmetrics", "sklearn", "yaml", "PIL", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ["--steps", "2", "--batch-size", "8", "--val-length", "24", "--device", "cpu", "--head", "csra"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of ten classes, and a folder of scenes."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(["train", "--out", str(folder / "run"), "--num-classes", "10", *TRAIN]) == 0
    assert cli.main(["scenes", str(folder / "scenes"), "--count", "5", "--num-classes", "10"]) == 0
    return folder


def one_line(capsys):
    """The only line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.rstrip("\n")


def exit_code(arguments):
    """What the command exits with, whether argparse or the command itself finds the mistake."""
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return error.code


def test_train_writes_a_run_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--head-opt", "num_heads=2", "--head-opt", "lam=0.5", "--no-channels-last", "--lr", "1e-3"]
    assert cli.main(["train", "--out", str(out), *TRAIN, *options]) == 0
    printed = capsys.readouterr()
    assert f"{out / 'best.pt'}" in printed.out
    assert "images/s" in printed.err
    assert {p.name for p in out.iterdir()} == {"config.yaml", "log.jsonl", "log.csv", "best.pt", "last.pt"}
    assert "num_heads: 2" in (out / "config.yaml").read_text()
    assert cli.main(["train", "--resume", str(out)]) == 0
    assert "resuming" in capsys.readouterr().err
    assert cli.main(["train", "--config", str(out / "config.yaml"), "--steps", "1", "--overwrite"]) == 0
    assert "of 1:" in capsys.readouterr().out


def test_eval_prints_a_table_or_json(run_folder, capsys):
    checkpoint = str(run_folder / "run/best.pt")
    assert cli.main(["eval", checkpoint, "--val-length", "50", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()][:4] == ["mAP", "CP", "CR", "CF1"]
    assert cli.main(["eval", checkpoint, "--json", "--split", "val", "--val-length", "50", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 10
    folder = ["--data", str(run_folder / "scenes/images"), "--labels", str(run_folder / "scenes/labels.csv")]
    assert cli.main(["eval", checkpoint, *folder, "--split", "train", "--device", "cpu", "--json"]) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["classes"] <= 10


def test_predict_names_classes_and_draws_them(run_folder, tmp_path, capsys):
    from PIL import Image

    images = [str(run_folder / f"scenes/images/0000{i}.png") for i in range(2)]
    checkpoint = str(run_folder / "run/best.pt")
    assert (
        cli.main(["predict", checkpoint, *images, "--out", str(tmp_path), "--device", "cpu", "--threshold", "0"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, path in zip(lines, images, strict=True):
        assert line.startswith(f"{path}: ")
        assert line.count(",") == 4  # the top five
    with Image.open(tmp_path / "00000.png") as picture:
        assert picture.width > 5 * picture.height * 0.6
    same = [images[0], images[0]]
    assert cli.main(["predict", *same, "--checkpoint", checkpoint, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert (tmp_path / "00000-2.png").is_file()


def test_predict_goes_on_past_a_corrupt_image_and_says_so(run_folder, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = str(run_folder / "scenes/images/00000.png")
    arguments = [
        "predict",
        str(run_folder / "run/best.pt"),
        str(broken),
        good,
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert good in printed.out
    assert f"{broken}: cannot be decoded" in printed.err
    assert "1 of 2 images could not be read" in printed.err


def test_info_prints_the_report(capsys):
    assert cli.main(["info"]) == 0
    assert torch.__version__.partition("+")[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--hed", "gap"], "--hed must be an option or argument of mlhead train (did you mean '--head'"),
        (["train", "--lr", "fast"], "argument --lr: must be a number, got 'fast'"),
        (["train", "--steps", "1.5"], "argument --steps: must be a whole number, got '1.5'"),
        (
            ["train", "--head", "gup"],
            "--head must be one of gap, csra, ml_decoder, transformer_decoder, zero_shot, got 'gup'",
        ),
        (["train", "--head-opt", "groups"], "--head-opt must be name=value, got 'groups'"),
        (["train", "--config", "/no/such.yaml"], "--config must be an existing YAML or JSON file, got /no/such.yaml"),
        (["train", "--resume", "/no/such/run"], "checkpoint must be an existing file, got /no/such/run"),
        (["train", "--data", "/no/such"], "--data must be 'scenes' or an existing folder of images, got '/no/such'"),
        (["train", "--data", "."], "--labels must be given for a folder of images"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["eval"], "the following arguments are required: CHECKPOINT"),
        (["eval", "/no/such.pt"], "checkpoint must be an existing file, got /no/such.pt"),
        (["predict", "/no/such.pt"], "IMAGE must be at least one image after the checkpoint"),
        (["predict", "/no/such.pt", "/no/x.png"], "IMAGE must be an existing image file, got /no/x.png"),
        (["scenes", "/tmp/x", "--count", "0"], "--count must be at least 1, got 0"),
        (["scenes", "/tmp/x", "--num-classes", "7"], "--num-classes must be 10, 100, 1000 or 10000"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(arguments) == 2
    line = one_line(capsys)
    assert words in line
    assert line.startswith("mlhead")


def test_every_option_is_in_the_help(capsys):
    assert exit_code(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--head-lr-mult", "--accumulate", "--ema", "--amp", "--schedule", "--on-bad-data", "--resume"):
        assert name in text


def python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"mlhead {mlhead.__version__}\n"


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom mlhead import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'timm', 'torchvision', 'torchmetrics', 'sklearn', 'matplotlib', 'PIL', 'yaml', 'triton'}\n"
        "found = heavy & set(sys.modules)\nassert not found, found\n"
    )
    result = python(program)
    assert result.returncode == 0, result.stderr


def test_a_missing_package_says_how_to_install_it(tmp_path):
    # In the order in which training needs them, so that none is loaded before its turn to be missing.
    program = (
        "import sys\nfrom mlhead import cli\n"
        "for name in ('sklearn', 'timm', 'yaml'):\n"
        "    assert name not in sys.modules, name\n"
        "    sys.modules[name] = None\n"
        "    code = cli.main(['train', '--out', sys.argv[1], '--steps', '1', '--device', 'cpu', '--head', 'gap'])\n"
        "    assert code == 2, code\n"
        "    del sys.modules[name]\n"
    )
    result = python(program, str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    names = ("sklearn", "timm", "yaml")
    for line, name in zip(result.stderr.splitlines(), names, strict=True):
        assert line.endswith(f"needs {name}, which is not installed: pip install 'mlhead[train]'")


def test_module_entry_point():
    result = subprocess.run(
        [sys.executable, "-m", "mlhead", "nothing"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_only_training_is_for_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["eval", "nowhere.pt"]) == 2
    assert "mlhead eval: error: it runs in one process, without torchrun, got 2" in capsys.readouterr().err
