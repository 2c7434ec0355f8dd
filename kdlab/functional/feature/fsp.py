"""Flow of solution procedure: products of the channels of two layers (FSP)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.feature.maps import at_least_float32, batched_products


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Compute the flow of solution procedure: products of the channels of two layers, averaged over positions.

    .. math:: G_{ij} = \frac{1}{H W} \sum_p F^1_{ip} F^2_{jp}

    Yim et al., *A Gift from Knowledge Distillation*, CVPR 2017.

    Args:
        first: (B, m, H, W) of the earlier layer.
        second: (B, n, H', W') of the later one; the finer of the two is averaged down to the grid of the coarser.

    Returns:
        (B, m, n).
    """
    a, b = at_least_float32(first), at_least_float32(second)
    if a.shape[2:] != b.shape[2:]:
        grid = min((a.shape[2], a.shape[3]), (b.shape[2], b.shape[3]), key=math.prod)
        a, b = F.adaptive_avg_pool2d(a, grid), F.adaptive_avg_pool2d(b, grid)
    return batched_products(a.flatten(2), b.flatten(2).transpose(1, 2)) / math.prod(a.shape[2:])
