"""The ops: public functions, and their registration with torch."""

from ._fused import decompositions
from .csra_pool import csra_attention, csra_pool
from .dropout_add_layer_norm import dropout_add_layer_norm
from .group_fc import group_fc
from .query_attention import query_attention, query_attention_weights
from .relu_dropout import relu_dropout

__all__ = [
    "csra_attention",
    "csra_pool",
    "decompositions",
    "dropout_add_layer_norm",
    "group_fc",
    "query_attention",
    "query_attention_weights",
    "relu_dropout",
]
