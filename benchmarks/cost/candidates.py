"""What benchmarks.tune tries of one site on one workload, and how a configuration takes the shipped one's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlhead.testing import CASES, aot
from mlhead.testing.offline import compiling
from mlhead.testing.sass import Binary, read_binary

from ..model import Ranked, Ranking, rankings
from .devices import Resources
from .launches import csra_loss_chunks, loss_blocks
from .products import Problem
from .sites import Config, Site, neighbours


@dataclass(frozen=True)
class Trial:
    """One site in one pass of one workload, and the configurations to try there.

    Args:
        ranking: All configurations as the model ranks them.
        problem: Shape, dtype and device.
        dtype: Name of the dtype.
        configs: Those to try, the shipped one first.
    """

    ranking: Ranking
    problem: Problem
    dtype: str
    configs: tuple[Ranked, ...]

    def title(self) -> str:
        """One line for people."""
        dims = " ".join(f"{letter}={value}" for letter, value in self.problem.dims.items())
        return f"{self.ranking.site.title} {self.ranking.workload} {self.dtype} {self.ranking.key}  {dims}"


def choose(ranking: Ranking, best: int, most_neighbours: int | None) -> tuple[Ranked, ...]:
    """The shipped one, the model's best `best`, and the shipped one's neighbours, the best first.

    Of those that the model cannot tell apart it is the first.
    """
    chosen = {ranking.shipped.config: ranking.shipped}
    seen = {ranking.shipped.seconds}
    for ranked in ranking.configs:
        if len(seen) > best:
            break
        if ranked.seconds not in seen:
            chosen[ranked.config] = ranked
            seen.add(ranked.seconds)
    near = set(neighbours(ranking.site, ranking.arguments))
    beside = [ranked for ranked in ranking.configs if ranked.config in near and ranked.config not in chosen]
    for ranked in beside[:most_neighbours]:
        chosen[ranked.config] = ranked
    return tuple(chosen.values())


def trials(
    op: str, workload: str, p: Problem, dtype: str, keys: list[str] | None, best: int, most_neighbours: int | None
) -> list[Trial]:
    """What is to be tried of an op on one workload."""
    return [
        Trial(ranking, p, dtype, choose(ranking, best, most_neighbours))
        for ranking in rankings(op, workload, p)
        if keys is None or ranking.key in keys
    ]


@contextmanager
def configured(site: Site, config: Config) -> Iterator[None]:
    """Makes the site's launches use a configuration; launchers look the function up in their module at every call."""
    with mock.patch.object(site.kernel_module(), site.name, return_value=config):
        yield


def with_configuration(site: Site, config: Config, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the site's launches so configured; unlike `configured` it costs no time worth mentioning."""
    module, shipped = site.kernel_module(), site.function()

    def replacement(*arguments: Any) -> Config:
        return config

    def run(*arguments: Any) -> Any:
        setattr(module, site.name, replacement)
        try:
            return function(*arguments)
        finally:
            setattr(module, site.name, shipped)

    return run


@contextmanager
def _only(names: tuple[str, ...]) -> Iterator[None]:
    """Leaves out the launches of all other kernels, inside `compiling`."""
    from triton.runtime.jit import JITFunction

    inner = JITFunction.run

    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return inner(self, *arguments, **keywords) if self.__name__ in names else None

    with mock.patch.object(JITFunction, "run", run):
        yield


def _launch(trial: Trial) -> None:
    """Calls the op's launchers on fake tensors of the workload."""
    site, p = trial.ranking.site, trial.problem
    if site.op == "csra_loss":
        _launch_csra_loss(trial)
        return
    if site.module == "_class_loss":
        _launch_loss(trial)
        return
    case = CASES[site.op]
    variant = aot.Variant(trial.ranking.workload, p.dims, "tf32" if p.tf32 else trial.dtype, all_needs=False)
    with ExitStack() as stack:
        if site.op == "csra_pool":  # both designs, since a site belongs to one of them
            from mlhead.ops._csra_kernels import forward_design

            stack.enter_context(forward_design("fused" if site.name == "fused_tile" else "chunked"))
        stack.enter_context(aot._tf32(p.tf32))
        stack.enter_context(aot._straight_to_triton(variant))
        for sample in aot._samples(case, variant):
            sample.call()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def _loss_of(p: Problem, z: torch.Tensor, bias: torch.Tensor | None, classes: int) -> None:
    """The losses' kernels on a block of logits (g, b, n) of groups of `classes`, with sparse targets."""
    from mlhead.kernels import class_loss

    B, loss = z.shape[1], p.dims.get("loss", "bce")
    sparse = (_empty(B * p["positives"], dtype=torch.int64), _empty(B + 1, dtype=torch.int64), None)
    at = (z, bias, 0, classes, p["C"], *sparse, None)
    statistics, row_loss = (_empty(B, 4), None) if loss == "softmax" else (None, _empty(B))
    if statistics is not None:
        class_loss.softmax_statistics(*at, 0.0, statistics)
    gammas = (4.0, 0.0) if loss == "asl" else (0.0, 0.0)
    class_loss.gradient(
        *at, None, None, loss, *gammas, 0.05, 1e-8, True, 0.0, 1.0 / B, None, row_loss, statistics, True
    )


def _launch_loss(trial: Trial) -> None:
    """Launches the losses' kernels on fake blocks of logits with a bias, as group_fc_loss does."""
    p, dtype = trial.problem, aot.DTYPES[trial.dtype]
    for g, n in loss_blocks(p):
        _loss_of(p, _empty(g, p["B"], n, dtype=dtype), _empty(p["C"], dtype=dtype), -(-p["C"] // p["G"]))


def _launch_csra_loss(trial: Trial) -> None:
    """Launches the kernels of pooling and of the losses on fake chunks of scores, as csra_loss does."""
    from mlhead.kernels import csra_pool

    p, dtype = trial.problem, aot.DTYPES[trial.dtype]
    L, H = p["L"], p["H"]
    options = CASES["csra_pool"].make({**p.dims, "B": 1, "L": 1, "D": 1}, dtype, "cpu", 0).options
    for b, n, _ in csra_loss_chunks(p):
        scores, scale, dlogits = _empty(b, L, H * n, dtype=dtype), _empty(H * n), _empty(b, n, dtype=dtype)
        shared = scale, options["temperatures"], (options["lam"],) * H, options["average"], n, 0
        csra_pool.pool(scores, *shared, _empty(b, H * n))
        _loss_of(p, _empty(1, b, n), None, p["C"])
        csra_pool.pool_backward(scores, *shared, dlogits, scores)


def compiled(trial: Trial, config: Config, target: str, kernels: tuple[str, ...]) -> list[tuple[str, Binary]]:
    """The different binaries of these kernels with a configuration of the site, compiled without a GPU."""
    site = trial.ranking.site
    found: dict[str, tuple[str, Binary]] = {}

    def report(function: Any, kernel: Any, arguments: dict[str, Any]) -> None:
        if kernel.hash not in found:
            found[kernel.hash] = (function.__name__, read_binary(kernel))

    with FakeTensorMode(), compiling(target, report), _only(kernels), configured(site, config):
        _launch(trial)
    return list(found.values())


def spills(binary: Binary) -> bool:
    """Whether registers went to memory."""
    return max(binary.stack, binary.local, binary.spills) > 0


def resources(binaries: list[tuple[str, Binary]]) -> dict[str, Resources]:
    """What the compiler gave each kernel, of several binaries the most."""
    found: dict[str, Resources] = {}
    for name, binary in binaries:
        before = found.get(name, Resources(0, 0))
        found[name] = Resources(max(before.registers, binary.registers), max(before.shared, binary.shared))
    return found
