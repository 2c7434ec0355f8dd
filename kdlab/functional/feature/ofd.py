"""Partial distance of responses before a ReLU, and the margin of that ReLU (OFD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlab.functional.feature.maps import at_least_float32


def negative_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    r"""Compute the mean of the negative part of N(mean, deviation²): the margin of a margin ReLU.

    .. math::
        E[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)}

    Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019, by the shift and scale of the BatchNorm.

    Args:
        mean: any shape.
        deviation: tensor of the same shape; its sign does not count.

    Returns:
        Of that shape, at most 0, in the precision of ``mean``. Computed in float64 by the logarithm of :math:`\Phi`,
        so that a channel that is hardly ever negative needs no case of its own: its margin tends to 0.
    """
    mu, sigma = mean.double(), deviation.double().abs().clamp(min=1e-12)
    z = mu / sigma
    ratio = torch.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(-z))
    # far out this is a difference of nearly equal numbers, whose expansion begins with -sigma / z
    margin = torch.where(z > 1e4, -sigma / z.clamp(min=1.0), mu - sigma * ratio)
    return margin.clamp(max=0.0).to(mean.dtype)


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the squared distance without the elements that are negative in the teacher and lower in the student.

    .. math::
        \sum_i \begin{cases} 0 & S_i \le T_i \le 0 \\ (T_i - S_i)^2 & \text{otherwise} \end{cases}

    Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019.

    Args:
        student: (B, ...).
        teacher: tensor of the same shape.

    Returns:
        (B,), summed over the elements.
    """
    s, t = at_least_float32(student), at_least_float32(teacher)
    gap = torch.where((s <= t) & (t <= 0), torch.zeros_like(s), t - s)
    return gap.pow(2).flatten(1).sum(1)
