"""The ops: public functions, and their registration with torch."""

from ._fused import decompositions
from .csra_pool import csra_attention, csra_pool
from .group_fc import group_fc
from .query_attention import query_attention, query_attention_weights

__all__ = ["csra_attention", "csra_pool", "decompositions", "group_fc", "query_attention", "query_attention_weights"]
