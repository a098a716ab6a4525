"""What several processes do together in the tests of training and of checkpoints; `launch` starts them.

Scenarios write below a folder; the tests, in a process of their own, look at what is there. To import torch and timm
takes seconds, so a group is forked from one process that has done so, with the environment that torchrun would give.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).resolve().parent.parent

# A backbone without batch norm and dropout: one process and several then compute the same.
VIT = {"backbone": "test_vit", "backbone_opt": {"img_size": 48}, "image_size": 48, "channels_last": False}
TINY = {"num_classes": 10, "val_length": 21, "log_every": 1, "device": "cpu", "lr": 0.1, "optimizer": "momentum"}
SMALL = {"embed_dim": 32, "num_heads": 4, "feedforward_dim": 32}
DECODER = {"head": "ml_decoder", "head_opt": {**SMALL, "groups": 4}}
STILL = {**VIT, **TINY, "head": "ml_decoder", "head_opt": {**SMALL, "groups": 4, "dropout": 0.0}}
STEPS = {"steps": 4, "eval_every": 4, "batch_size": 8, "accumulate": 2, "clip_grad": 0.5, "ema": 0.9}
SUM = {"loss_opt": {"reduction": "sum"}}

# What one process and several train to the same weights.
SAME: dict[str, dict[str, Any]] = {
    "ddp": {**VIT, **TINY, **STEPS, "head": "gap", **SUM},
    "fsdp": {**STILL, **STEPS, "fused_loss": True, "parallel": "fsdp", "metrics": "topk"},
    "classes": {**STILL, **STEPS, "fused_loss": True, "class_parallel": 2, "metrics": "topk", **SUM},
    "classes_fsdp": {**VIT, **TINY, **STEPS, "head": "csra", "class_parallel": 2, "parallel": "fsdp"},
    "words": {**STILL, **STEPS, "task": "zero-shot", "num_classes": 100, "class_parallel": 2},
}
SAME["words"]["head_opt"] = {**SMALL, "dropout": 0.0}

# Batch norm, dropout and a draw of its own for every process: what a resumed run must repeat.
LIVELY = {**TINY, **DECODER, "image_size": 24, "batch_size": 8, "ema": 0.9, "optimizer": "adamw", "lr": 1e-3}
LIVELY |= {"steps": 7, "eval_every": 7, "checkpoint_every": 4, "train_length": 40}
LIVELIES = {"ddp": {}, "fsdp": {"parallel": "fsdp", "class_parallel": 2, "fused_loss": True}}

# Begun on some number of processes, and ended on another.
MOVED = {**STILL, "batch_size": 12, "ema": 0.9, "steps": 5, "eval_every": 5, "checkpoint_every": 3, "fused_loss": True}

# Killed and restarted.
KILLED = {**LIVELY, "steps": 16, "eval_every": 8, "checkpoint_every": 1}


def launch(out: Path, *groups: str, timeout: float = 170) -> None:
    """Runs groups of processes one after another: each "N NAME NAME ..." for N processes and their scenarios."""
    command = [sys.executable, str(Path(__file__).resolve()), str(out), *groups]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr


def torchrun(processes: int, *options: str) -> list[str]:
    """The beginning of a command line; a rendezvous of its own lets several run at a time."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]


def environment() -> dict[str, str]:
    """One thread a process: the order of sums depends on it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(out: Path, options: dict[str, Any], stop: int | None = None) -> None:
    """A run, or its first steps and the checkpoint that is due there."""
    from mlhead import train
    from mlhead._config import TrainConfig
    from mlhead.distributed import launched

    config = TrainConfig(out=str(out), **options)
    if stop is None:
        train.train(config, stream=io.StringIO())
        return
    with launched() as processes:
        processes.from_main(lambda: out.mkdir(parents=True, exist_ok=True))
        trainer = train.Trainer(config, stream=io.StringIO(), processes=processes)
        trainer.eval_every, trainer.total_steps = stop + 1, stop
        trainer.fit()


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """The same options for one process."""
    return {**options, "parallel": None, "class_parallel": 0}


def unreadable(out: Path) -> dict[str, Any]:
    """Options of a run on a folder of which many images cannot be read."""
    options = {**VIT, **TINY, **STEPS, "ema": 0.0, "steps": 6, "eval_every": 6, "batch_size": 4, "head": "gap"}
    options |= {"data": str(out / "data/images"), "labels": str(out / "data/labels.csv"), "val_fraction": 0.3}
    options |= {"hflip": 0.0, "crop_scale": 1.0, "color_jitter": 0.0}
    return {name: value for name, value in options.items() if name not in ("num_classes", "val_length")}


def full_disk(out: Path) -> Any:
    """One process cannot write; all say so, and the checkpoint before is as it was."""
    from mlhead import _dcp
    from mlhead.checkpoints import CheckpointError, load_checkpoint
    from mlhead.distributed import launched

    path, said = out / "disk/last.dcp", ""
    with launched() as processes:
        states = [{"step": step, "model": {"w": torch.full((50_000,), float(step))}} for step in (1, 2)]
        states[1]["model"]["more"] = torch.arange(50_000.0)  # each process writes one of them
        _dcp.save(path, states[0], {}, processes)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if processes.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            _dcp.save(path, states[1], {}, processes)
        except CheckpointError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        after = load_checkpoint(path)
        intact = after["step"] == 1 and bool((after["model"]["w"] == 1).all())
        processes.gather(None)  # until the first has cleared up
        return processes.gather((said, intact, sorted(p.name for p in path.parent.iterdir())))


def agreement(out: Path) -> Any:
    """What processes tell each other, and the scaler of a loss in fp16 that overflows on one of them."""
    from mlhead._spread import _AgreedScaler
    from mlhead.distributed import launched

    with launched() as processes:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler, steps = _AgreedScaler("cpu", init_scale=4.0), []
        for gradient in (4.0, float("inf") if processes.rank == 1 else 4.0):
            scaler.scale(torch.ones(()))
            weight.grad = torch.full((3,), gradient)
            scaler.step(optimizer)
            scaler.update()
            steps.append((weight.detach().tolist(), scaler.get_scale()))
        found = {"sum": processes.total(processes.rank + 0.5), "largest": processes.largest(-processes.rank)}
        found |= {"main": processes.from_main(lambda: processes.rank + 7), "steps": steps}
        return processes.gather(found)


def mistake(out: Path) -> NoReturn:
    """A command line that does not fit two processes."""
    from mlhead import cli

    said = os.open(out / "mistake.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    os._exit(cli.main(["train", "--batch-size", "7", "--device", "cpu", "--out", str(out / "mistake")]))


def scenario(out: Path, name: str, which: str) -> None:
    """One of them; every process of a group calls it."""
    from mlhead import train
    from mlhead.distributed import launched

    with launched() as processes:
        if name == "same":
            run(out / which, SAME[which])
        elif name == "lively":  # whole, then in two parts
            options = {**LIVELY, **LIVELIES[which]}
            run(out / which / "whole", options)
            run(out / which / "part", options, stop=4)
            train.resume(out / which / "part", stream=io.StringIO())
        elif name == "begin":
            run(out / which, {**MOVED, "class_parallel": 2, "parallel": "fsdp"}, stop=3)
        elif name == "end":
            run_on = {"class_parallel": 2, "parallel": "fsdp"} if which == "from_one" else {"class_parallel": 0}
            train.resume(out / which, run_on, stream=io.StringIO())
        elif name == "undisturbed":
            run(out / name, KILLED)
        elif name == "unreadable":
            run(out / name, unreadable(out))
        else:
            found = {"full_disk": full_disk, "agreement": agreement}[name](out)
            if processes.is_main:
                (out / f"{name}.json").write_text(json.dumps(found))


def member(out: Path, rank: int, world: int, port: int, scenarios: list[str]) -> None:
    """What one process of a group does."""
    from mlhead.distributed import launched

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    if scenarios == ["mistake"]:
        mistake(out)
    with launched():
        for each in scenarios:
            name, _, which = each.partition(":")
            scenario(out, name, which)


def group(out: Path, world: int, scenarios: list[str]) -> bool:
    """Forks the processes of a group; as torchrun does, ends all of them when one fails. Whether none has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            try:
                member(out, rank, world, port, scenarios)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        members.append(child)
    failed = False
    while members:
        child, status = os.wait()
        members.remove(child)
        if status and not failed:
            failed = True
            for other in members:
                os.kill(other, signal.SIGTERM)
    return not failed


def main(out: Path, groups: list[str]) -> int:
    """Runs the groups; 1 as soon as one fails that should not."""
    import timm.optim
    import timm.utils  # noqa: F401 (for the processes to be forked)

    import mlhead.train  # noqa: F401
    from mlhead.data.scenes import scan_table

    scan_table()
    torch.set_num_threads(1)
    for text in groups:
        world, *scenarios = text.split()
        if group(out, int(world), scenarios) == (scenarios == ["mistake"]):
            return 1
        if "begin:from_four" in scenarios:
            for name in ("on_three", "on_two", "on_one"):
                shutil.copytree(out / "from_four", out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
