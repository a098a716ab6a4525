"""Every head, small, for the tests that all of them pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mlhead.heads import CSRAHead, GAPHead, Head, MLDecoder, TransformerDecoder

D, C, E = 12, 7, 16
SMALL = {"embed_dim": E, "num_heads": 2, "feedforward_dim": 24}
MAKERS: dict[str, Callable[..., Head]] = {
    "gap": lambda **o: GAPHead(D, C, **o),
    "csra": lambda **o: CSRAHead(D, C, num_heads=2, bias=True, **o),
    "csra-plain": lambda **o: CSRAHead(D, C, normalize=False, lam=0.3, **o),
    "ml_decoder": lambda **o: MLDecoder(D, C, groups=3, **SMALL, **o),
    "ml_decoder-full": lambda **o: MLDecoder(D, C, groups=C, queries="learnable", **SMALL, **o),
    "transformer_decoder": lambda **o: TransformerDecoder(D, C, **SMALL, **o),
}
DECODERS = [name for name in MAKERS if "decoder" in name]
every_head = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
every_decoder = pytest.mark.parametrize("make", [MAKERS[n] for n in DECODERS], ids=DECODERS)


def fp64(head: Head) -> Head:
    """The head in fp64 with random biases, so that a bias at the wrong place shows."""
    head = head.double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return head
