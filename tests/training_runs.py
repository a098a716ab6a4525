"""Short training runs for several test files."""

from __future__ import annotations

import io

from mlhead import train
from mlhead._config import TrainConfig

SMALL_DECODER = {"embed_dim": 32, "num_heads": 4, "feedforward_dim": 32, "groups": 20}
# A backbone without a ReLU: where one's input is all but 0, the last bit of a weight decides if a gradient flows.
SMOOTH = {"backbone": "test_vit", "backbone_opt": {"img_size": 48}, "image_size": 48, "channels_last": False}
HEADS = {
    "gap": {"head": "gap"},
    "csra": {"head": "csra", "head_opt": {"num_heads": 2, "bias": True}},
    "ml_decoder": {"head": "ml_decoder", "head_opt": SMALL_DECODER},
}


def config(out, **options):
    """Of a run of 12 small steps, unless `options` say otherwise."""
    defaults = {"steps": 12, "batch_size": 8, "val_length": 32, "log_every": 5, "image_size": 40, "device": "cpu"}
    return TrainConfig(**{**defaults, "out": str(out), **options})


def run(out, **options):
    """The summary of such a run."""
    return train.train(config(out, **options), stream=io.StringIO())
