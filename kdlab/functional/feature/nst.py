"""Maximum mean discrepancy between channels (neuron selectivity transfer)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.feature.maps import at_least_float32, batched_products


def polynomial_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the squared maximum mean discrepancy of two layers' channels, with the kernel :math:`(x^\top y)^2`.

    .. math::
        \frac{1}{C_T^2} \sum_{i i'} k(t_i, t_{i'}) + \frac{1}{C_S^2} \sum_{j j'} k(s_j, s_{j'})
        - \frac{2}{C_T C_S} \sum_{i j} k(t_i, s_j)

    with each channel's map flattened and of unit length. Huang & Wang, *Like What You Like: Knowledge Distill via
    Neuron Selectivity Transfer*, 2017, whose polynomial kernel has d = 2, c = 0.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W), of the same grid.

    Returns:
        (B,), at least 0 but for rounding.
    """
    s, t = (F.normalize(at_least_float32(x).flatten(2), dim=2) for x in (student, teacher))
    if s.shape[2] <= s.shape[1] + t.shape[1]:
        # the same by the positions: no difference of large sums, and less of them on the coarse grids of deep layers
        gram_s, gram_t = (batched_products(x.transpose(1, 2), x) / x.shape[1] for x in (s, t))
        return (gram_s - gram_t).pow(2).sum((1, 2))
    same_t, same_s, cross = (
        batched_products(x, y.transpose(1, 2)).pow(2).mean((1, 2)) for x, y in ((t, t), (s, s), (t, s))
    )
    return same_t + same_s - 2 * cross
