"""Pearson correlation of predictions, between classes and within one (DIST)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlab.functional.response.divergence import log_probabilities, same_shape


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""Compute one minus Pearson's correlation over the last dimension, in [0, 2], invariant to scale and shift.

    .. math:: 1 - \frac{\sum_c (a_c - \bar a)(b_c - \bar b)}{\|a - \bar a\|\,\|b - \bar b\|}

    A vector that is constant up to rounding correlates with nothing: 1, without a gradient.

    Args:
        a: (..., n).
        b: the same shape.

    >>> pearson_distance(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 5.0, 9.0])).abs() < 1e-6
    tensor(True)
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return 1 - (_unit(a.to(wide)) * _unit(b.to(wide))).sum(-1)


def _unit(x: Tensor) -> Tensor:
    """Centre over the last dimension and scale to length 1; zero where the numbers are equal up to rounding."""
    centred = x - x.mean(-1, keepdim=True)
    # relative to x: the probabilities of a rare class are tiny throughout, and still correlate
    flat = centred.norm(dim=-1, keepdim=True) <= 8 * torch.finfo(x.dtype).eps * x.norm(dim=-1, keepdim=True)
    centred = centred.masked_fill(flat, 0.0)
    return centred / centred.norm(dim=-1, keepdim=True).masked_fill(flat, 1.0)


def inter_class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the Pearson distance of the probabilities that both give a row's classes: (B, C) logits -> (B,).

    .. math:: d_p\big(p^S_{i,:},\, p^T_{i,:}\big)

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022.
    """
    same_shape(student, teacher)
    return pearson_distance(log_probabilities(student).exp(), log_probabilities(teacher).exp())


def intra_class_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean over classes of the Pearson distance of a class's probabilities in the rows of a batch.

    .. math:: \tfrac1C \sum_c d_p\big(p^S_{:,c},\, p^T_{:,c}\big)

    Huang et al., NeurIPS 2022. (B, C) logits -> scalar; 1 for a batch of one row, where nothing can correlate.
    """
    same_shape(student, teacher)
    return pearson_distance(log_probabilities(student).exp().T, log_probabilities(teacher).exp().T).mean()
