"""Soft targets made without a teacher, and weights of soft targets by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.response.divergence import cross_entropy, kl, log_probabilities, masked_classes, same_shape


def target_cross_entropy(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    r"""Compute cross-entropy with the target class, weighted by the teacher's probability: (B, C) logits -> (B,).

    .. math:: -\,p^T_{it} \log p^S_{it}

    Yang et al., *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        targets: (B,) class ids, each in [0, C).
    """
    same_shape(student, teacher)
    at = targets[:, None]
    p = log_probabilities(teacher).gather(-1, at).exp()
    return -(p * log_probabilities(student).gather(-1, at)).squeeze(-1)


def soft_label_weight(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    r"""Compute the weight of a row's soft targets, in [0, 1): large where the student knows less than the teacher.

    .. math:: 1 - \exp\big(-\mathrm{CE}(y_i, p^S_i) \,/\, \mathrm{CE}(y_i, p^T_i)\big)

    No gradient is taken through it. Zhou et al., *Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective*, ICLR 2021.

    Args:
        student: logits (B, C), not softened.
        teacher: logits (B, C), not softened.
        targets: (B,) class ids with ``-100`` for no label, or (B, C) probabilities; 0 for a row without a label.
    """
    same_shape(student, teacher)
    student_loss, teacher_loss = (cross_entropy(logits.detach(), targets) for logits in (student, teacher))
    return -torch.expm1(-student_loss / (teacher_loss + 1e-7))  # the teacher's may be 0 up to rounding


def virtual_teacher(targets: Tensor, classes: int, correct: float, temperature: float) -> Tensor:
    r"""Return logits of a teacher that is right with probability ``correct`` and knows nothing else: (B,) -> (B, C).

    .. math:: \tfrac1T \log p^d_{ic}, \qquad p^d_{ic} = a \ \text{if}\ c = y_i,\ \text{else}\ \tfrac{1 - a}{C - 1}

    with a = ``correct``. Yuan et al., *Revisiting Knowledge Distillation via Label Smoothing Regularization*, CVPR
    2020.

    Args:
        targets: (B,) class ids, each in [0, C).
        classes: C, at least 1.
        correct: a, in (0, 1).
        temperature: T, above 0.
    """
    if classes == 1:  # nothing to be wrong about
        return torch.zeros(len(targets), 1, device=targets.device)
    right, wrong = math.log(correct) / temperature, math.log((1 - correct) / (classes - 1)) / temperature
    return wrong + (right - wrong) * F.one_hot(targets, classes).float()


def entropy(logits: Tensor) -> Tensor:
    """Compute the Shannon entropy of the softmax, in nats: (..., C) -> (...)."""
    log_p = log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(-1)


def custom_target_weight(student: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    r"""Compute a soft label of the target class from the student's own belief: (B, C) logits -> (B,), in (0, 2).

    .. math:: 1 + p_{it}^2 - \tfrac1B \sum_j p_{jt}^2

    No gradient is taken through it. Yang et al., ICCV 2023 (USKD).

    Args:
        student: logits (B, C).
        targets: (B,) class ids, each in [0, C).
        counted: (B,) bool, the rows that the mean goes over.
    """
    squared = log_probabilities(student.detach()).gather(-1, targets[:, None]).squeeze(-1).exp().square()
    mean = torch.where(counted, squared, 0.0).sum() / counted.sum().clamp(min=1)
    return 1 + squared - mean


def without_target(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the logits of the classes that are not the target, in their order: (B, C) -> (B, C - 1)."""
    away = ~F.one_hot(targets, logits.shape[-1]).bool()
    return logits[away].reshape(len(logits), logits.shape[-1] - 1)


def zipf_kl(logits: Tensor, *, by: list[Tensor]) -> Tensor:
    r"""Compute the KL from Zipf's law over ranked classes: (B, n) logits -> (B,).

    .. math:: \mathrm{KL}(z_i \,\|\, \mathrm{softmax}(l_i)), \qquad z_{ic} = \frac{1/r_{ic}}{\sum_k 1/k}

    with :math:`r_{ic}` in 1 … n the rank of class c in row i by the sum of the softmaxes of ``by``. Yang et al., ICCV
    2023 (USKD), for the classes that are not the target.

    Args:
        logits: (B, n).
        by: logits of the same shape that rank the classes; no gradient is taken through them.
    """
    belief = torch.stack([log_probabilities(each.detach()).exp() for each in by]).sum(0)
    order = belief.argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(dim=-1) + 1
    zipf_logits = -ranks.to(belief.dtype).log()
    return kl(logits, zipf_logits.masked_fill(masked_classes(logits), -math.inf))
