"""mlhead: fused classification heads for PyTorch."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

# `kernels/` stands beside this package in a checkout and inside it once installed. From an uninstalled checkout,
# its parent joins the search path of this package, so that `mlhead.kernels` is the same module everywhere.
_root = _Path(__file__).resolve().parent
if not (_root / "kernels").is_dir() and (_root.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root.parent))

from . import losses, optim  # noqa: E402
from ._backend import BackendError, backend, record_backends  # noqa: E402
from .backbones import attach_head  # noqa: E402
from .flops import register_flop_formulas  # noqa: E402
from .heads import (  # noqa: E402
    CSRAHead,
    GAPHead,
    MLDecoder,
    QueryAugmentation,
    TransformerDecoder,
    ZeroShotMLDecoder,
    plain_max_score,
)
from .max_score import with_max_score  # noqa: E402
from .memory import HeadMemory, head_memory  # noqa: E402
from .ops import (  # noqa: E402
    SparseTargets,
    csra_attention,
    csra_loss,
    csra_pool,
    decompositions,
    dropout_add_layer_norm,
    group_fc,
    group_fc_loss,
    group_fc_select,
    group_fc_topk,
    linear_loss,
    linear_select,
    linear_topk,
    query_attention,
    query_attention_weights,
    relu_dropout,
)
from .pretrained import head_from_public, load_public, public_state_dict  # noqa: E402


def __getattr__(name: str) -> _Any:
    """`mlhead.metrics` and `mlhead.parallel` without an import of their own, loaded when first used."""
    if name in ("metrics", "parallel"):
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "CSRAHead",
    "GAPHead",
    "HeadMemory",
    "MLDecoder",
    "QueryAugmentation",
    "SparseTargets",
    "TransformerDecoder",
    "ZeroShotMLDecoder",
    "attach_head",
    "backend",
    "csra_attention",
    "csra_loss",
    "csra_pool",
    "decompositions",
    "dropout_add_layer_norm",
    "group_fc",
    "group_fc_loss",
    "group_fc_select",
    "group_fc_topk",
    "head_from_public",
    "head_memory",
    "linear_loss",
    "linear_select",
    "linear_topk",
    "load_public",
    "losses",
    "metrics",
    "optim",
    "parallel",
    "plain_max_score",
    "public_state_dict",
    "query_attention",
    "query_attention_weights",
    "record_backends",
    "register_flop_formulas",
    "relu_dropout",
    "with_max_score",
]
