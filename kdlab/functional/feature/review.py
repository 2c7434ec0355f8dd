"""Distance of feature maps over several grids, from fine to coarse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.response.divergence import squared_error

LEVELS = (4, 2, 1)
"""Sides of the grids that maps are pooled to."""


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute ReviewKD's hierarchical context loss: squared error on the maps' own grid, and on coarser ones.

    .. math::
        \Big(\sum_{l} 2^{-l}\Big)^{-1} \sum_{l=0}^{L} 2^{-l}\, \tfrac{1}{n_l}\, \| P_l F^S_i - P_l F^T_i \|^2

    where :math:`P_0` leaves the map as it is, and :math:`P_1, P_2, \dots` average it into grids of 4x4, 2x2 and 1x1,
    of which those smaller than the map count. Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021 (the
    weights, and that they are made to sum to 1, are those of the authors' code).

    Args:
        student: (B, C, H, W).
        teacher: maps of the same shape.

    Returns:
        (B,), in at least float32.

    Raises:
        ValueError: if the shapes differ.
    """
    total, weight, weights = squared_error(student, teacher), 1.0, 1.0
    wide = torch.promote_types(student.dtype, torch.float32)
    gap = student.to(wide) - teacher.to(wide)  # pooling is linear: one map to pool, not two
    for side in LEVELS:
        if side < min(gap.shape[2:]):
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(gap, side).pow(2).flatten(1).mean(1)
    return total / weights
