"""More than one process on torch.distributed: how they start, agree and fail together, and which parts each one has."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mlhead._usage import usage_fail
from mlhead.data.loading import Share
from mlhead.evaluation import choose_device

T = TypeVar("T")

# How long the others wait, at most, for the first process that failed to say why.
_LAST_WORDS_S = 20.0


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is.

    What they tell each other here travels in CPU memory, whatever the device of the model.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes logs."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Its part of a batch."""
        return Share(self.rank, self.world)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All of them; None for a single one."""
        return dist.group.WORLD if self.world > 1 else None

    def device(self, name: str) -> torch.device:
        """The device that --device names; of several CUDA devices each process has one."""
        device = choose_device(name)
        if self.world == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            usage_fail("--device", "'auto', 'cuda' or 'cpu' for several processes", repr(name))
        device = choose_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)
        return device

    def total(self, value: float) -> float:
        """The sum of a number over the processes, in fp64."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of a number."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, op: Any) -> float:
        if self.world == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op)
        return number.item()

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, work: Callable[[], T]) -> T:
        """What the main process gets from `work`; the others wait for it."""
        if self.world == 1:
            return work()
        values = [work() if self.is_main else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]


ALONE = Processes()


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for what is random in one process and in no other, from some step of a run on."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def was_restarted() -> bool:
    """Whether torchrun has started this process anew after another one of the run had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun has started, connected; a single one without torchrun.

    Communicates over gloo between CPUs and over NCCL between CUDA devices. Where processes fail, because of the same
    mistake or because another one is gone, the first to do so raises its error and the others leave without a word.
    """
    environment = os.environ
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), int(environment.get("LOCAL_RANK", "0")))
        return
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    kept, rank, world = next(rendezvous("env://"))
    # torchrun keeps its store when it starts all anew; the addresses in it are those of processes that are gone.
    store = dist.PrefixStore(f"mlhead/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", kept)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Processes(rank, world, int(environment.get("LOCAL_RANK", "0")))
    except BaseException:
        # The group is left as it is: to take it apart would wait for processes that are not coming.
        if not _first_to_fail(store):
            time.sleep(_LAST_WORDS_S)  # torchrun ends this one as soon as the first has gone
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def _first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that kept it
        return False
