"""One training step of class-parallel heads in a group of gloo processes: what it sends and what memory it takes.

    python -m benchmarks.scale_steps SETTINGS          as `benchmarks.scale.launch` starts it

This process brings up the loopback interface where it has one of its own, and starts the processes of the group. Each
writes what it found.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import socket
import struct
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from mlhead import SparseTargets, losses
from mlhead._resident import resident
from mlhead.heads import CSRAHead, GAPHead, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from mlhead.ops import _fused
from mlhead.parallel import class_parameters, parallelize_head, step_traffic

LAYOUTS = {"same images": Replicate(), "own images": Shard(0)}
LOSSES = {
    "bce": losses.BinaryCrossEntropy,
    "asl": losses.AsymmetricLoss,
    "softmax": losses.SoftmaxCrossEntropy,
}
# The collectives of c10d, and which argument is what a device puts in.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}


def make_head(case: dict[str, Any]) -> Any:
    """The head of a case, on the meta device but for the word vectors of a zero-shot head."""
    dims, loss = case["dims"], LOSSES[case["loss"]]()
    D, C, E = dims["D"], dims["C"], dims.get("E", 8)
    decoder = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 2 * E, "dropout": 0.0, "loss": loss}
    kind, dtype = case["head"], getattr(torch, case.get("dtype", "float32"))
    if kind == "zero_shot":
        vectors = torch.randn(C, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
        return ZeroShotMLDecoder(D, C, word_vectors=vectors, groups=dims.get("G"), dtype=dtype, **decoder)
    made: dict[str, Any] = {"device": "meta", "dtype": dtype}
    if kind == "gap":
        return GAPHead(D, C, loss=loss, **made)
    if kind == "csra":
        return CSRAHead(D, C, num_heads=dims.get("H", 1), bias=True, loss=loss, **made)
    if kind == "ml_decoder":
        return MLDecoder(D, C, groups=dims["G"], **decoder, **made)
    return TransformerDecoder(D, C, **decoder, **made)


def traffic_of(case: dict[str, Any], processes: int) -> Any:
    """What the formula says of a case."""
    dims, replicas = case["dims"], case.get("replicas", 1)
    options = {name: case[name] for name in ("ignore", "sample_weight") if name in case}
    options["labels"] = dims["B"] * case["labels"] if case.get("labels") else None
    return step_traffic(
        make_head(case), processes // replicas, dims["B"], positions=dims["L"],
        input_layouts=LAYOUTS[case["layout"]], replicas=replicas, **options,
    )  # fmt: skip


class Step:
    """A sharded head with features and targets of this process."""

    def __init__(self, case: dict[str, Any], rank: int, processes: int) -> None:
        replicas, dims = case.get("replicas", 1), case["dims"]
        names = ("replicas", "classes") if replicas > 1 else None
        mesh = init_device_mesh(
            "cpu", (replicas, processes // replicas) if replicas > 1 else (processes,), mesh_dim_names=names
        )
        own = case["layout"] == "own images"
        torch.manual_seed(0)
        self.head = make_head(case)
        parallelize_head(self.head, mesh, input_layouts=LAYOUTS[case["layout"]])
        if case["head"] != "zero_shot":
            self.head.to_empty(device="cpu")
        for parameter in self.head.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            torch.nn.init.uniform_(local.detach(), -0.05, 0.05)
        if own:
            torch.manual_seed(rank)
        B, C = dims["B"], dims["C"]
        dtype = getattr(torch, case.get("dtype", "float32"))
        self.features = torch.randn(B, dims["L"], dims["D"], dtype=dtype, requires_grad=True)
        self.options: dict[str, Tensor] = {"sample_weight": torch.ones(B)} if case.get("sample_weight") else {}
        if labels := case.get("labels"):
            rows = [torch.randperm(C)[: labels + 1].tolist() for _ in range(B)]
            ignore = [row[-1:] for row in rows] if case.get("ignore") else None
            self.targets: Any = SparseTargets.from_lists(
                [row[: labels - bool(ignore)] for row in rows], C, ignore=ignore
            )
        else:
            self.targets = torch.rand(B, C) < 3 / C
            if case.get("ignore"):
                self.options["ignore"] = ~self.targets & (torch.rand(B, C) < 0.3)

    def run(self) -> None:
        """Forward and backward."""
        for tensor in (self.features, *self.head.parameters()):
            tensor.grad = None
        self.head(self.features, self.targets, **self.options).backward()


class Collectives(TorchDispatchMode):
    """Counts what is put into each collective, by purpose and operation."""

    def __init__(self, zero_shot: bool) -> None:
        super().__init__()
        self.zero_shot = zero_shot  # whose parameters' gradients, of fewer axes than the memory's, are summed likewise
        self.found: Counter[tuple[str, str]] = Counter()
        # What an op does inside is not seen from outside, so it is run here.
        self.bodies = {op.forward_op: op._run for op in _fused._all} | {
            op.backward_op: op._run_backward for op in _fused._all
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an op."""
        if func in self.bodies:
            with self:
                return self.bodies[func](*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            operation, place = OPERATIONS[func._opname]  # any other is an error
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            self.found[_purpose(self.zero_shot), operation] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def _purpose(zero_shot: bool) -> str:
    """What a collective is for, by the functions that are being called."""
    frame, calls, gradient = sys._getframe(), set(), None
    while frame is not None:
        if Path(frame.f_code.co_filename).name == "_moves.py" and frame.f_code.co_name == "backward":
            gradient = frame.f_locals["grad"]
        calls.add((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    if ("class_loss.py", "add_shards") in calls:
        return "statistics"
    if any(file == "_targets.py" for file, _ in calls):
        return "targets"
    if gradient is not None:
        return "parameter_gradients" if zero_shot and gradient.ndim < 3 else "feature_gradients"
    if ("_shards.py", "_check_batch") in calls:
        return "features"
    if ("_moves.py", "forward") in calls:
        return "loss" if ("_shards.py", "loss") in calls else "features"
    return "targets" if ("_shards.py", "loss") in calls else "parameter_gradients"


def loopback_sent() -> int:
    """Bytes that the loopback interface of this namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("/proc/net/dev has no interface lo")


def count(case: dict[str, Any], rank: int, processes: int) -> dict[str, int]:
    """Payloads of one step, by "purpose operation"."""
    return _counted(Step(case, rank, processes))


def _counted(step: Step) -> dict[str, int]:
    with Collectives(isinstance(step.head, ZeroShotMLDecoder)) as collectives:
        step.run()
    return {" ".join(key): payload for key, payload in collectives.found.items()}


def wire(case: dict[str, Any], rank: int, processes: int) -> tuple[dict[str, int], float]:
    """As `count`, and the bytes that a process sends through the interface in one step, the mean over the processes."""
    step = Step(case, rank, processes)
    counted, ends = _counted(step), []
    for run in (step.run, lambda: None):
        dist.barrier()
        ends.append(loopback_sent())
        dist.barrier()
        run()
    return counted, (ends[1] - ends[0]) / processes


def memory(case: dict[str, Any], rank: int, processes: int) -> int:
    """Bytes that two steps with AdamW take beyond what was resident before the head was there."""
    small = {**case, "dims": {**case["dims"], "C": max(1000, case["dims"].get("G", 1))}}
    for chosen in (small, case):  # the first has what is loaded once loaded
        Path("/proc/self/clear_refs").write_text("5")  # what a step before had at the most is forgotten
        before = resident()[0]
        step = Step(chosen, rank, processes)
        # In groups of their own: a fused optimizer takes no DTensors among plain tensors.
        classes = list(class_parameters(step.head).values())
        rest = [p for name, p in step.head.named_parameters() if name not in class_parameters(step.head)]
        groups = [{"params": group} for group in (classes, rest) if group]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        for _ in range(2):
            step.run()
            optimizer.step()
        most = resident()[1] - before
        del step, optimizer
    return most


MEASURES = {"count": count, "wire": wire, "memory": memory}


def _one(settings: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{settings['folder']}/store", rank=rank, world_size=settings["processes"],
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = [MEASURES[name](case, rank, settings["processes"]) for name, case in settings["todo"]]
    Path(settings["folder"], f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        get_flags, set_flags, up = 0x8913, 0x8914, 1
        (flags,) = struct.unpack("16xh22x", fcntl.ioctl(one, get_flags, struct.pack("16sh22x", b"lo", 0)))
        fcntl.ioctl(one, set_flags, struct.pack("16sh22x", b"lo", flags | up))


def main(arguments: list[str]) -> int:
    """Starts the processes of a group."""
    settings = json.loads(arguments[0])
    if settings["own_network"]:
        _loopback_up()
    # After the imports, which take seconds; DTensor would import torch._dynamo later.
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_one, args=(settings, rank)) for rank in range(settings["processes"])]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return max(abs(process.exitcode or 0) for process in started)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
