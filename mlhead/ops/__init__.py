"""The ops: public functions, and their registration with torch."""

from ._fused import decompositions
from ._targets import SparseTargets
from .csra_loss import csra_loss
from .csra_pool import csra_attention, csra_pool
from .dropout_add_layer_norm import dropout_add_layer_norm
from .group_fc import group_fc
from .group_fc_loss import group_fc_loss
from .linear_loss import linear_loss
from .query_attention import query_attention, query_attention_weights
from .relu_dropout import relu_dropout
from .topk import group_fc_select, group_fc_topk, linear_select, linear_topk

__all__ = [
    "SparseTargets",
    "csra_attention",
    "csra_loss",
    "csra_pool",
    "decompositions",
    "dropout_add_layer_norm",
    "group_fc",
    "group_fc_loss",
    "group_fc_select",
    "group_fc_topk",
    "linear_loss",
    "linear_select",
    "linear_topk",
    "query_attention",
    "query_attention_weights",
    "relu_dropout",
]
