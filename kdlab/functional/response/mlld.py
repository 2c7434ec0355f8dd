"""Gram matrices of predictions over a batch and over classes (multi-level logit distillation)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlab.functional.response.divergence import log_probabilities, same_shape


def batch_gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute squared differences of the similarities of rows' outputs, summed over one row: (B, C) logits -> (B,).

    .. math:: \sum_j \big(\langle p^S_i, p^S_j \rangle - \langle p^T_i, p^T_j \rangle\big)^2

    Its mean over the rows is :math:`\tfrac1B \|G^S - G^T\|_F^2`, the batch-level term of Jin et al., *Multi-Level Logit
    Distillation*, CVPR 2023.
    """
    same_shape(student, teacher)
    s, t = log_probabilities(student).exp(), log_probabilities(teacher).exp()
    with torch.autocast(s.device.type, enabled=False):  # it would multiply the float32 matrices in half precision
        return (s @ s.T - t @ t.T).pow(2).sum(-1)


def class_gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the squared difference of how often both networks confuse two classes: (B, C) logits -> scalar.

    .. math:: \tfrac1C \big\| (P^S)^\top P^S - (P^T)^\top P^T \big\|_F^2

    with P (B, C) the probabilities; summed, not averaged, over the rows, so it grows with the square of their number.
    Jin et al., CVPR 2023, class level. Takes C² numbers.
    """
    same_shape(student, teacher)
    s, t = log_probabilities(student).exp(), log_probabilities(teacher).exp()
    with torch.autocast(s.device.type, enabled=False):
        return (s.T @ s - t.T @ t).pow(2).sum() / s.shape[-1]
