"""When the projections of keys and values are cheaper on the queries' side.

Scores are q_h . (W_k,h m) = (q_h W_k,h) . m, and the output is W_v,h (sum_l p m_l): with queries of width E on the
memory itself, neither keys nor values are ever made. Per image, in FLOPs,

    standard   4 L E^2 (keys and values)  +  4 G L E (attention)
    absorbed   4 H G L E (attention over H G queries of width E)  +  2 G E^2 (values of the output)
               + 2 G E^2 (q W_k; for queries shared by the batch once for all images)

so it pays for few queries: G H well below E.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """How fast a kind of machine does the products of attention, as shares of its rate for large matrix products.

    Args:
        narrow: Attention of heads of the usual width, E / H.
        wide: Attention of one head of width E.
        small: The products of single heads with the projections, G rows each.
        margin: Absorb only if it then takes at most this share of the standard form's time.
    """

    narrow: float
    wide: float
    small: float
    margin: float


# CPU: fitted to the attention layer alone, absorbed over standard time, fp32, forward and backward, interleaved on two
# cores of an AMD EPYC (AVX2) beside another process, commit 8878219, torch 2.14.1, by a script that is not kept; B = 8,
# E = 768, H = 8, queries of each image (shared by the batch):
#   L = 196:  G = 20  0.60 (0.44)   G = 40  1.03 (0.83)   G = 60  1.17 (1.14)   G = 80  1.65 (1.20)
#   L =  49:  G = 20  1.30 (0.76)   G = 40  1.65 (1.36)
# CUDA: assumed, not measured: the kernels cut a head of this width into parts.
RATES = {
    "cpu": Rates(narrow=0.8, wide=0.45, small=0.5, margin=0.9),
    "cuda": Rates(narrow=0.3, wide=0.1, small=0.5, margin=0.8),
}


def absorbs(B: int, G: int, L: int, E: int, H: int, *, shared: bool, device_type: str) -> bool:
    """Whether queries take over the projections of keys and values; `shared` if they are the same for all images."""
    rates = RATES.get(device_type)
    if rates is None or H == 1:
        return False
    standard = 4 * L * E * E + 4 * G * L * E / rates.narrow
    projections = 2 * G * E * E * (1 + 1 / (max(1, B) if shared else 1))
    absorbed = 4 * H * G * L * E / rates.wide + projections / rates.small
    return absorbed <= rates.margin * standard
