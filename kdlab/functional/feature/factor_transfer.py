"""Distance of factors of unit length (factor transfer)."""

from __future__ import annotations

from torch import Tensor

from kdlab.functional.feature.maps import at_least_float32
from kdlab.functional.relation.relation import unit


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean absolute difference of two factors of unit length.

    .. math:: \frac{1}{n} \Big\| \frac{F_S}{\|F_S\|_2} - \frac{F_T}{\|F_T\|_2} \Big\|_1

    Kim et al., *Paraphrasing Complex Network: Network Compression via Factor Transfer*, NeurIPS 2018 (p = 1). The mean
    over the n elements is that of the authors' code. (Tian et al.'s benchmark, ICLR 2020, takes other factors: the mean
    of the squares over the channels.) A factor of zeros stays zero, and gets no gradient.

    Args:
        student: (B, ...).
        teacher: tensor of the same shape.

    Returns:
        (B,).
    """
    s, t = (unit(at_least_float32(x).flatten(1)) for x in (student, teacher))
    return (s - t).abs().mean(1)
