"""What of a run's state may lie on several processes: the model, its moving average and the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mlhead import _dcp
from mlhead.checkpoints import CheckpointError
from mlhead.distributed import Processes


def shared_state(model: nn.Module, ema: nn.Module | None, optimizer: Optimizer) -> dict[str, Any]:
    """The state by names of parameters, every process with its part of it; all call this."""
    return {
        "model": model.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def restore(
    path: Path,
    saved: dict[str, Any],
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Optimizer,
    processes: Processes,
) -> None:
    """Puts back the state of a checkpoint, of as many processes as it may have been; all call this.

    Args:
        path: of the checkpoint, a file or a folder.
        saved: what is read of it at first: of a file all, of a folder what is not a tensor.
        model: gets the weights.
        ema: gets the moving average.
        optimizer: of the model.
        processes: of the run.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    if processes.world == 1 and path.suffix != ".dcp":
        model.load_state_dict(saved["model"])
        if ema is not None:
            ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        return
    here, tensors = _dcp.split(shared_state(model, ema, optimizer), "")
    if path.suffix == ".dcp":
        tree = {name: saved[name] for name in here}
        filled = _dcp.load(path, saved, tensors, processes)
    else:
        whole = {
            "model": saved["model"],
            "ema": saved["ema"],
            "optimizer": _by_name(model, optimizer, saved["optimizer"]),
        }
        tree, values = _dcp.split(whole, "")
        filled = tensors.keys() & values.keys()
        for name in filled:
            _dcp.fill(tensors[name], values[name])
    if missing := sorted(name for name in tensors.keys() - filled if not name.startswith("optimizer/")):
        raise CheckpointError(f"checkpoint must have {missing[0]}, got {path} without it and {len(missing) - 1} others")
    # Weights last: making the state of an optimizer takes a step of it, at a rate of 0.
    options = StateDictOptions(strict=False)  # parameters that never had a gradient have no state
    set_optimizer_state_dict(model, optimizer, _dcp.joined(tree["optimizer"], tensors), options=options)
    model.load_state_dict(_dcp.joined(here["model"], tensors))
    if ema is not None:
        ema.load_state_dict(_dcp.joined(here["ema"], tensors))


def _by_name(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's own state, which numbers its parameters, by their names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[i]: values for i, values in state["state"].items()}, "param_groups": groups}
