"""All cases: tests, benchmarks and audits run whatever is listed here."""

from ..case import OpCase
from . import csra_loss, csra_pool, dropout_add_layer_norm, group_fc, group_fc_loss, query_attention, relu_dropout

CASES: dict[str, OpCase] = {
    module.CASE.name: module.CASE
    for module in (
        group_fc,
        csra_pool,
        query_attention,
        dropout_add_layer_norm,
        relu_dropout,
        group_fc_loss,
        csra_loss,
    )
}
