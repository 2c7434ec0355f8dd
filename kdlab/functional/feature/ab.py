"""Distance across the activation boundary (AB)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.feature.maps import at_least_float32


def boundary_distance(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    r"""Compute the distance of the student's responses from the teacher's side of zero, with a margin.

    .. math::
        \big\| \rho(T) \odot \sigma(\mu - S) + (1 - \rho(T)) \odot \sigma(\mu + S) \big\|_2^2

    :math:`\rho` says whether a neuron is active (above 0), :math:`\sigma` is ReLU, :math:`\mu` the margin. Heo et al.,
    *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*, AAAI 2019.

    Args:
        student: responses before their activation, any shape (B, ...), as wide as the teacher's.
        teacher: responses of the same shape.
        margin: margin, above 0.

    Returns:
        (B,), summed over the neurons.
    """
    s = at_least_float32(student)
    return F.relu(margin - torch.where(teacher > 0, s, -s)).pow(2).flatten(1).sum(1)
