"""The configuration functions of kernels/, and what they might answer instead.

A site is a function from shape, dtype and device to a launch configuration. Its space is what might stand in the place
of its answer.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mlhead.kernels._device import Device as KernelDevice

from .devices import Device, Work, occupancy

Config = Any  # one of the frozen dataclasses of kernels/
Values = dict[str, tuple[int, ...]]
Pick = Callable[..., Config]


@dataclass(frozen=True)
class Site:
    """One configuration function.

    Args:
        op: The case that it is measured by here.
        module: Its module in kernels/.
        name: Its name.
        kernels: The kernels that it launches.
        wrt: The inputs whose gradients only these kernels make, None for all.
        values: What each field of a candidate may be; a field that is not there stays as shipped.
    """

    op: str
    module: str
    name: str
    kernels: tuple[str, ...]
    values: Values = field(hash=False)
    wrt: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        """As in the results: module.function."""
        return f"{self.module}.{self.name}"

    def kernel_module(self) -> Any:
        """The module that holds it."""
        return importlib.import_module(f"mlhead.kernels.{self.module}")

    def function(self) -> Callable[..., Config]:
        """The shipped function."""
        return getattr(self.kernel_module(), self.name)

    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return tuple(inspect.signature(self.function()).parameters)


POWERS = (16, 32, 64, 128, 256)
STAGES = (1, 2, 3, 4, 5)
TILE: Values = {
    "BLOCK_B": POWERS, "BLOCK_E": POWERS, "BLOCK_J": POWERS, "num_warps": (2, 4, 8), "num_stages": STAGES,
}  # fmt: skip
ATTENTION: Values = {
    "BLOCK_G": POWERS[:4], "BLOCK_L": POWERS, "num_warps": (2, 4, 8, 16), "num_stages": STAGES[:4],
}  # fmt: skip
ROWS: Values = {"BLOCK_R": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16)}
POOLING: tuple[str, str, tuple[str, ...], Values] = (
    "csra_pool", "pool_tile", ("csra_pool_scores_kernel", "csra_pool_scores_backward_kernel"),
    {"BLOCK_L": (8, 16, 32, 64), "BLOCK_N": (16, 32, 64, 128), "num_warps": (1, 2, 4, 8)},
)  # fmt: skip
LOSS: tuple[str, str, tuple[str, ...], Values] = (
    "_class_loss", "loss_tile", ("class_loss_gradient_kernel", "class_loss_statistics_kernel"),
    {"BLOCK_I": tuple(1 << i for i in range(11)), "BLOCK_N": tuple(1 << i for i in range(12)),
     "num_warps": (1, 2, 4, 8)},
)  # fmt: skip
# A function that two ops launch by is a site of each.
SITES = (
    Site("group_fc", "group_fc", "forward_tile", ("group_fc_forward_kernel",), TILE),
    Site("group_fc", "group_fc_backward", "dh_tile", ("group_fc_dh_kernel",), TILE, ("h",)),
    Site("group_fc", "group_fc_backward", "dweight_tile", ("group_fc_dweight_kernel",), TILE, ("weight", "bias")),
    Site(
        "csra_pool", "csra_pool_fused", "fused_tile", ("csra_fused_forward_kernel",),
        {"BLOCK_R": (64, 128), "BLOCK_N": (32, 64, 128, 256), "BLOCK_D": (16, 32, 64, 128),
         "num_warps": (4, 8), "num_stages": STAGES},
    ),
    Site("csra_pool", *POOLING),
    Site("query_attention", "query_attention", "forward_tile", ("query_attention_forward_kernel",), ATTENTION),
    Site(
        "query_attention", "query_attention_backward", "backward_tile",
        ("query_attention_backward_kernel", "query_attention_keys_backward_kernel"), ATTENTION,
    ),
    Site(
        "query_attention", "query_attention_keys_backward", "keys_tile", ("query_attention_keys_backward_kernel",),
        ATTENTION,
    ),
    Site(
        "dropout_add_layer_norm", "dropout_add_layer_norm", "forward_tile",
        ("dropout_add_layer_norm_forward_kernel",), ROWS,
    ),
    Site(
        "dropout_add_layer_norm", "dropout_add_layer_norm_backward", "backward_tile",
        ("dropout_add_layer_norm_backward_kernel",), ROWS,
    ),
    Site(
        "relu_dropout", "relu_dropout", "flat_tile", ("relu_dropout_forward_kernel", "relu_dropout_backward_kernel"),
        {"BLOCK_R": tuple(1 << i for i in range(10)), "BLOCK_M": tuple(1 << i for i in range(4, 14)),
         "num_warps": (1, 2, 4, 8)},
    ),
    Site("group_fc_loss", *LOSS),
    Site("csra_loss", *POOLING),
    Site("csra_loss", *LOSS),
)  # fmt: skip
OPS = tuple(dict.fromkeys(site.op for site in SITES))


def kernel_device(device: Device) -> KernelDevice:
    """The device as the configuration functions see it."""
    return KernelDevice(device.capability, device.multiprocessors, device.program_bytes)


class Picker:
    """Calls configuration functions, with those given replaced, and keeps which were called with what."""

    def __init__(self, replaced: Mapping[str, Config] | None = None) -> None:
        self.replaced = replaced or {}
        self.called: dict[str, list[tuple[Any, ...]]] = {}

    def __call__(self, title: str, *arguments: Any) -> Config:
        """The configuration of a site for the arguments of its function."""
        if arguments not in self.called.setdefault(title, []):
            self.called[title].append(arguments)
        if title in self.replaced:
            return self.replaced[title]
        return BY_TITLE[title].function()(*arguments)


# Of two sites of one function the first.
BY_TITLE = {site.title: site for site in reversed(SITES)}


def covering(size: int, least: int = 1) -> int:
    """The power of two that covers a size."""
    return max(least, 1 << max(0, size - 1).bit_length())


# Which size a field of a tile covers, and the least that it has to be able to be.
COVERS = {
    "BLOCK_B": ("B", 16), "BLOCK_E": ("E", 16), "BLOCK_J": ("J", 16), "BLOCK_G": ("G", 16), "BLOCK_L": ("L", 8),
    "BLOCK_I": ("g", 1), "BLOCK_M": ("M", 16),
}  # fmt: skip


def _values(site: Site, shipped: Config, facts: Mapping[str, Any]) -> Values:
    """What each field may be on a shape: no more than covers it, or than the shipped one has."""
    found = {}
    for name, values in site.values.items():
        letter, least = COVERS.get(name, ("", 0))
        if name == "BLOCK_N":
            letter, least = ("N", 64 if site.name == "fused_tile" else 16) if "N" in facts else ("n", 1)
        most = max(covering(facts[letter], least), getattr(shipped, name)) if letter in facts else max(values)
        found[name] = tuple(value for value in values if value <= most)
    return found


def _sensible(site: Site, config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether a configuration may be launched, with a sensible number of elements to a thread."""
    if site.name == "flat_tile":
        whole = config.BLOCK_R == 1 or config.BLOCK_M >= facts["M"]  # several rows only if they are whole
        return whole and 1024 <= config.BLOCK_R * config.BLOCK_M <= 16384
    if site.name == "loss_tile":
        # Never fewer logits than threads: one of two copies might be read after the other is overwritten.
        return max(32 * config.num_warps, 128) <= config.BLOCK_I * config.BLOCK_N <= 2048
    if site.op == "dropout_add_layer_norm":
        return 128 <= config.BLOCK_R * config.BLOCK_E <= 2048 * config.num_warps
    return True


@lru_cache(maxsize=256)
def space(site: Site, arguments: tuple[Any, ...]) -> tuple[Config, ...]:
    """All configurations of a site for the arguments of its function, the shipped one among them."""
    shipped = site.function()(*arguments)
    facts = dict(zip(site.parameters(), arguments, strict=True))
    values = _values(site, shipped, facts)
    fixed = {name: value for name, value in vars(shipped).items() if name not in values}
    found = (
        type(shipped)(**fixed, **dict(zip(values, chosen, strict=True)))
        for chosen in itertools.product(*values.values())
    )
    return tuple(config for config in found if _sensible(site, config, facts))


def neighbours(site: Site, arguments: tuple[Any, ...]) -> list[Config]:
    """The configurations of the space that differ from the shipped one by one step of one field."""
    shipped = site.function()(*arguments)

    def steps(config: Config) -> int:
        return sum(
            abs(values.index(getattr(config, name)) - values.index(getattr(shipped, name)))
            for name, values in site.values.items()
        )

    return [config for config in space(site, arguments) if steps(config) == 1]


def fits(works: list[Work], site: Site, device: Device) -> bool:
    """Whether all launches by a site fit the device, by the resources that they have."""
    return all(occupancy(work.resources, work.warps, device) > 0 for work in works if work.site == site.name)
