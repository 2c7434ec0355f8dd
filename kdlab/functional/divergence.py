"""Distances between what two networks say, one value per row.

Nothing here averages over rows, and nothing here knows a temperature: divide the logits first. Everything is computed
in at least float32, whatever autocast handed over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.types import NO_LABEL


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    # kl_div would broadcast a (B, 1) or (C,) teacher without a word
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def log_probabilities(logits: Tensor) -> Tensor:
    """``log_softmax`` over the last dimension in at least float32; a masked class (``-inf``) stays finite."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    out = F.log_softmax(logits, dim=-1)
    return out.clamp(min=torch.finfo(out.dtype).min)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher, ``KL(teacher || student)``.

    .. math:: \mathrm{KL}_i = \sum_c p^T_{ic} (\log p^T_{ic} - \log p^S_{ic})

    Args:
        student: logits (..., C).
        teacher: logits of the same shape; no gradient is taken through them unless they carry one.

    Returns:
        (...) in nats, summed (never averaged) over the classes.

    Raises:
        ValueError: if the shapes differ.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    _same_shape(student, teacher)
    p, q = log_probabilities(teacher), log_probabilities(student)
    return (p.exp() * (p - q)).sum(-1)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Cross-entropy against class ids or soft targets; zero for a row without a label.

    .. math:: \mathrm{CE}_i = -\sum_c t_{ic} \log p_{ic}

    Args:
        logits: (B, C).
        targets: (B,) class ids with ``-100`` for no label, or (B, C) probabilities.
        label_smoothing: share of the target spread evenly over the classes (Szegedy et al., CVPR 2016).

    Returns:
        (B,) in nats.
    """
    if targets.ndim == 1:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(
            logits, targets, ignore_index=NO_LABEL, reduction="none", label_smoothing=label_smoothing
        )
    # F.cross_entropy makes 0 * -inf of a masked class, and smooths a row without a label into one with
    log_p = log_probabilities(logits)
    targets = targets.to(log_p.dtype)
    if label_smoothing:
        even = (targets.sum(-1, keepdim=True) > 0) / targets.shape[-1]
        targets = (1 - label_smoothing) * targets + label_smoothing * even
    return -(targets * log_p).sum(-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over everything but the first dimension: (B, ...) -> (B,)."""
    _same_shape(student, teacher)
    wide = torch.promote_types(student.dtype, torch.float32)
    return (student.to(wide) - teacher.to(wide)).pow(2).flatten(1).mean(1)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Z-score of each row of logits: (B, C) -> (B, C) with mean 0 and (population) standard deviation 1.

    Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True, unbiased=False) + eps)


def decoupled_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two parts that KL falls into once the target class is named.

    .. math::
        \mathrm{TCKD}_i = \mathrm{KL}(b^T_i \| b^S_i), \qquad
        \mathrm{NCKD}_i = \mathrm{KL}(\hat p^T_i \| \hat p^S_i)

    with :math:`b` the two probabilities (target, everything else) and :math:`\hat p` the distribution over the
    other classes alone, so that :math:`\mathrm{KL} = \mathrm{TCKD} + (1 - p^T_t)\,\mathrm{NCKD}`.

    Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022.

    Args:
        student: logits (B, C), C at least 2.
        teacher: logits (B, C).
        targets: (B,) class ids, each in [0, C).

    Returns:
        TCKD and NCKD, (B,) each, in nats.
    """
    _same_shape(student, teacher)
    at = F.one_hot(targets, student.shape[-1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_probabilities(logits)
        target = log_p[at]
        # log of the summed probability of the others; 1 - p would lose it where p is close to 1
        rest = log_p.masked_fill(at, torch.finfo(log_p.dtype).min).logsumexp(-1)
        others = log_probabilities(logits.masked_fill(at, float("-inf")))
        return torch.stack([target, rest], -1), others.masked_fill(at, 0.0)

    (binary_s, others_s), (binary_t, others_t) = parts(student), parts(teacher)
    tckd = (binary_t.exp() * (binary_t - binary_s)).sum(-1)
    p = others_t.exp().masked_fill(at, 0.0)
    return tckd, (p * (others_t - others_s)).sum(-1)


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    r"""Normalised spatial attention map of a layer: (B, C, H, W) -> (B, H*W), unit length.

    .. math:: Q_i = \mathrm{vec}\Big(\tfrac{1}{C}\sum_c |F_{ic}|^p\Big), \qquad Q_i / \|Q_i\|_2

    Zagoruyko & Komodakis, *Paying More Attention to Attention*, ICLR 2017.
    """
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features.abs().pow(power).mean(1).flatten(1), dim=1)
