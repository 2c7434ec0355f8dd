"""Correlations of examples by a Gaussian kernel (correlation congruence)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlab.functional.relation.relation import between_rows, unit


@between_rows(2)
def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""Compute the distance of the student's correlations of examples, by a Gaussian kernel, from the teacher's.

    .. math::
        \tfrac{1}{B^2} \| K^S - K^T \|_F^2, \qquad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x_i \cdot x_j)^p

    of features of unit length: Taylor's expansion of :math:`e^{-\gamma \|x_i - x_j\|^2}`. Peng et al., *Correlation
    Congruence for Knowledge Distillation*, ICCV 2019.

    Args:
        student: (B, ...).
        teacher: (B, ...), of any width.
        gamma: width of the kernel.
        order: P, at which the expansion ends.

    Returns:
        A scalar.
    """

    def kernel(x: Tensor) -> Tensor:
        x = unit(x)
        cosine = x @ x.T
        total = torch.zeros_like(cosine)
        for p in range(order, -1, -1):  # Horner: from the highest power down
            total = total * cosine + math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
        return total

    return (kernel(student) - kernel(teacher)).square().mean()
