"""What the first of several processes has of a run's model, counted and measured; `python spread_sizes.py` prints JSON.

There is one process: torch's fake process group shards and allocates as a real one does, and sends nothing.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WORLD, IMAGES = 4, 8
SMALL = {"embed_dim": 64, "num_heads": 4, "feedforward_dim": 64}
PLAN = {"backbone": "test_resnet", "image_size": 64, "num_classes": 1003, "batch_size": WORLD * IMAGES, "device": "cpu"}
HEADS: dict[str, dict[str, Any]] = {
    "gap": {"head": "gap"},
    "csra": {"head": "csra", "head_opt": {"num_heads": 2, "bias": True}},
    "decoder": {"head": "ml_decoder", "head_opt": {**SMALL, "groups": 10}},
    "words": {"task": "zero-shot", "num_classes": 80, "head_opt": {**SMALL, "word_dim": 20}},
    "word groups": {"task": "zero-shot", "num_classes": 80, "head_opt": {**SMALL, "word_dim": 20, "groups": 16}},
}
# Which there are: FSDP takes no word vectors that are shared out.
SPREADS = [(head, "ddp", classes) for head in HEADS for classes in (1, 4)] + [
    *(("gap", "fsdp", 1), ("words", "fsdp", 1), ("gap", "fsdp", 4), ("csra", "fsdp", 4), ("decoder", "fsdp", 2))
]
COUNTED: dict[str, dict[str, Any]] = {
    f"{head} {kind} {classes}": {**PLAN, **HEADS[head], "parallel": kind, "class_parallel": classes, "ema": 0.9}
    for head, kind, classes in SPREADS
}
DEEP = {"backbone": "vit_small_patch16_224", "backbone_opt": {"img_size": 32, "depth": 4}, "image_size": 32}
DEEP |= {"head": "gap", "num_classes": 10, "batch_size": WORLD, "device": "cpu", "optimizer": "momentum"}
MEASURED: dict[str, dict[str, Any]] = {kind: {**DEEP, "parallel": kind} for kind in ("ddp", "fsdp")}


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(tensors: Any) -> int:
    return sum(_here(t).numel() * t.itemsize for t in tensors)


class Run:
    """Model and optimizer of a run, as `Trainer` makes them."""

    def __init__(self, options: dict[str, Any]) -> None:
        from mlhead import building
        from mlhead._config import TrainConfig
        from mlhead._spread import Spread
        from mlhead.distributed import Processes

        config = TrainConfig(**options)
        words = torch.randn(80, 20) if config.task == "zero-shot" else None
        seen = 64 if config.task == "zero-shot" else config.num_classes
        model = building.build_model(config, seen, 3, word_vectors=words)
        spread = Spread(config, Processes(world=WORLD), torch.device("cpu"))
        self.model = spread.prepared(model, config.channels_last).train()
        spread.shard(self.model)
        self.optimizer = building.build_optimizer(config, self.model)
        self.images = torch.randn(config.batch_size // WORLD, 3, config.image_size, config.image_size)
        self.forward = spread.wrap(self.model, tuple(self.images.shape[1:]))

    def step(self) -> None:
        """Forward, backward, update."""
        self.forward(self.images).logsumexp(1).sum().backward()
        self.optimizer.step()

    def saved(self) -> int:
        """Bytes that forward keeps for backward, beside weights."""
        kept = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = _here(tensor).untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        own = {_here(t).untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward(self.images)
        return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def count(options: dict[str, Any]) -> dict[str, int]:
    """Bytes by what holds them."""
    run = Run(options)
    found = {"saved": run.saved()} if options["parallel"] == "ddp" else {}
    run.step()
    parameters: list[nn.Parameter] = list(run.model.parameters())
    state = [v for each in run.optimizer.state.values() for v in each.values() if isinstance(v, Tensor)]
    found |= {"weights": _bytes(parameters), "buffers": _bytes(run.model.buffers()), "state": _bytes(state)}
    return {**found, "gradients": _bytes(p.grad for p in parameters if p.grad is not None)}


def measure(options: dict[str, Any]) -> int:
    """The most resident memory in two steps, beyond what was there without the model."""
    from mlhead._resident import resident

    run = Run(options)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # what making the model took at the most is forgotten
    before = resident()[0] - _bytes(run.model.parameters())
    for _ in range(2):
        run.optimizer.zero_grad()
        run.step()
    return resident()[1] - before


def main() -> None:
    """Counts and measures."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    measure({**DEEP, "backbone": "test_vit", "backbone_opt": {"img_size": 32}})  # loads what is loaded once
    found = {"measured": {name: measure(options) for name, options in MEASURED.items()}}
    print(json.dumps({**found, "counted": {name: count(options) for name, options in COUNTED.items()}}))


if __name__ == "__main__":
    main()
