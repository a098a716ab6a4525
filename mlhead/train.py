"""The training loop: exact after any interruption, plain about what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlhead import _dcp, checkpoints
from mlhead._config import TrainConfig
from mlhead._trainer import Saved, Summary, Trainer
from mlhead._usage import UsageError, check_folder, usage_fail
from mlhead.distributed import Processes, launched, was_restarted

# What a resumed run may change; everything else would make it another run.
CHANGEABLE = ("device", "workers", "log_every", "checkpoint_every", "parallel", "class_parallel")


def train(config: TrainConfig, *, overwrite: bool = False, stream: Any = None) -> Summary:
    """A new run in `config.out`, which gets config.yaml, log.jsonl, log.csv and the checkpoints best and last.

    Under torchrun all processes train together. Where torchrun has started them anew after a failure, the run goes on
    from its last checkpoint.

    Raises:
        UsageError: the folder holds a run already and `overwrite` is False; or an option does not fit.
    """
    with launched() as processes:
        out = Path(config.out)
        if was_restarted() and (path := processes.from_main(lambda: _to_go_on_with(config, out))):
            return _resume(path, {}, stream, processes)
        processes.from_main(lambda: _check_room(out, overwrite))
        trainer = Trainer(config, stream=stream, processes=processes)
        processes.from_main(lambda: _make_room(out))  # not before: options that cannot be must not cost an earlier run
        if processes.is_main:
            config.save(out / "config.yaml")
        return trainer.fit()


def _check_room(out: Path, overwrite: bool) -> None:
    check_folder("--out", out)
    if any(checkpoints.find(out, name) for name in checkpoints.NAMES) and not overwrite:
        usage_fail("--out", "a folder without a run (or use --overwrite, or --resume)", out)


def _make_room(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(out)
    for name in checkpoints.NAMES:
        checkpoints.remove(out / f"{name}.pt")
        checkpoints.remove(out / f"{name}.dcp")
    (out / "bad_data.txt").unlink(missing_ok=True)


def _to_go_on_with(config: TrainConfig, out: Path) -> Path | None:
    """The last checkpoint of a run with the same options, or None."""
    path = checkpoints.find(out, "last")
    if path is None:
        return None
    return path if _lasting(TrainConfig(**_read(path)["config"])) == _lasting(config) else None


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """The options that make it this run and no other."""
    values = {name: value for name, value in vars(config).items() if name not in (*CHANGEABLE, "out")}
    # The run itself adds how wide the word vectors of its data are.
    return {**values, "head_opt": {name: v for name, v in config.head_opt.items() if name != "word_dim"}}


def resume(path: Path, changes: dict[str, Any] | None = None, *, stream: Any = None) -> Summary:
    """Goes on with a run exactly where its checkpoint left it, on as many processes as there are now.

    Args:
        path: a checkpoint, or the folder of a run, of which the last one is taken.
        changes: options to change, of `CHANGEABLE` only.
        stream: where progress goes, by default stderr.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        UsageError: an option that would make it another run.
    """
    with launched() as processes:
        return _resume(path, changes or {}, stream, processes)


def _resume(path: Path, changes: dict[str, Any], stream: Any, processes: Processes) -> Summary:
    is_run = path.is_dir() and path.suffix != ".dcp"
    processes.from_main(lambda: checkpoints.remove_leftovers(path if is_run else path.parent))
    if is_run:
        path = processes.from_main(lambda: checkpoints.find(path, "last")) or path / "last.pt"
    elif not path.exists():  # a run on another number of processes writes a folder in the place of a file, or a file
        path = processes.from_main(lambda: checkpoints.find(path.parent, path.stem)) or path
    state = _read(path)
    for name in changes:
        if name not in CHANGEABLE:
            raise UsageError(
                f"--{name.replace('_', '-')} must be left as it is on --resume, which goes on with the saved options "
                f"(only {', '.join(CHANGEABLE)} may change)"
            )
    config = TrainConfig(**{**state["config"], **changes, "out": str(path.parent)})
    trainer = Trainer(config, resume=Saved(path, state), stream=stream, processes=processes)
    del state  # as large as model and optimizer together
    trainer._say(f"resuming {path} at step {trainer.step} of {trainer.total_steps}")
    return trainer.fit()


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, of a folder without the tensors."""
    return _dcp.read_plain(path) if path.suffix == ".dcp" else checkpoints.load_checkpoint(path)
