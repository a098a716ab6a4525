"""The heads: modules that turn features, maps (B, D, H, W) or tokens (B, L, D), into logits (B, C), or into a loss."""

from ._augmentation import QueryAugmentation
from ._base import Head
from .csra import CSRAHead
from .gap import GAPHead
from .max_score import plain_max_score
from .ml_decoder import MLDecoder
from .transformer_decoder import TransformerDecoder
from .zero_shot import ZeroShotMLDecoder

# What attach_head and the command line call them.
HEADS: dict[str, type[Head]] = {
    "gap": GAPHead,
    "csra": CSRAHead,
    "ml_decoder": MLDecoder,
    "transformer_decoder": TransformerDecoder,
    "zero_shot": ZeroShotMLDecoder,
}

__all__ = [
    "HEADS",
    "CSRAHead",
    "GAPHead",
    "Head",
    "MLDecoder",
    "QueryAugmentation",
    "TransformerDecoder",
    "ZeroShotMLDecoder",
    "plain_max_score",
]
