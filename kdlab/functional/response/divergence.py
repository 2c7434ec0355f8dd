"""Divergences between two distributions over classes, one value per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.types import NO_LABEL


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of two shapes."""
    # kl_div would broadcast a (B, 1) or (C,) teacher without a word
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def log_probabilities(logits: Tensor) -> Tensor:
    """Compute ``log_softmax`` over the last dimension in at least float32; a masked class (``-inf``) stays finite."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    out = F.log_softmax(logits, dim=-1)
    # short of the least number, so that T² times it is finite still: 0 times infinity would be NaN in a gradient
    return out.clamp(min=torch.finfo(out.dtype).min * 1e-6)


def masked_classes(logits: Tensor) -> Tensor:
    """Return a mask of the shape of ``logits``, true for masked classes, whose logit is ``-inf``."""
    return logits == float("-inf")


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the Kullback-Leibler divergence of the student from the teacher, ``KL(teacher || student)``.

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
    same_shape(student, teacher)
    p, q = log_probabilities(teacher), log_probabilities(student)
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute ``KL(student || teacher)``: large where the student believes what the teacher does not (mode seeking).

    .. math:: \sum_c p^S_{ic} (\log p^S_{ic} - \log p^T_{ic})

    Where the teacher's probability is exactly 0 (a masked class) and the student's is not, the truth is infinite; the
    value and its gradient are then finite, of about 1e31, and no training step survives them.

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024. Shapes as in :func:`kl`.
    """
    return kl(teacher, student)


def symmetric_kl(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the mean of KL in both directions, half of Jeffreys' divergence: the half keeps the scale of :func:`kl`.

    .. math:: \tfrac12 \sum_c (p^T_{ic} - p^S_{ic})(\log p^T_{ic} - \log p^S_{ic})

    Against a teacher's probability of exactly 0 it is as large as :func:`reverse_kl`. Jeffreys, *An Invariant Form for
    the Prior Probability in Estimation Problems*, Proc. R. Soc. A 1946. Shapes as in :func:`kl`.
    """
    same_shape(student, teacher)
    p, q = log_probabilities(teacher), log_probabilities(student)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2


def _kl_to_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    r"""Compute ``KL(p || (1 - share) p + share q)`` of log-probabilities (..., C), with a share in (0, 1].

    The ratio of mixture to p is :math:`1 + share\,(e^d - 1)`, d = log q - log p. Its logarithm keeps its *relative*
    precision as share or d go to 0, which the logarithms of p and of the mixture, subtracted, would lose; the
    generalised JSD divides by the share.
    """
    d = q - p
    if share == 1:
        return -(p.exp() * d).sum(-1)
    # beyond the bound one of the two is below e^-80 of the other, and adds nothing; exp(d) would overflow
    bound = 80.0 if d.dtype == torch.float32 else 700.0
    d = d.clamp(-bound, bound)
    if share <= 0.5:
        ratio = torch.log1p(share * torch.expm1(d))
    else:  # the same, with q taken out: 1 - share (1 - e^d) would cancel
        ratio = d + torch.log1p((1 - share) * torch.expm1(-d))
    return -(p.exp() * ratio).sum(-1)


def skew_kl(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    r"""Compute the KL of a mixture of both from the teacher, which stays finite where the student's probability is 0.

    .. math:: \mathrm{KL}\big(p^T \,\|\, \lambda p^T + (1 - \lambda) p^S\big), \qquad \lambda = skew

    Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024, whose alpha is
    ``skew`` here. Near the teacher its gradient is (1 - skew)² of KL's.

    Args:
        student: logits (..., C).
        teacher: logits of the same shape.
        skew: share of the teacher in the mixture, in [0, 1); 0 is :func:`kl`.

    Returns:
        (...) in nats, at most -log(skew).
    """
    same_shape(student, teacher)
    return _kl_to_mixture(log_probabilities(teacher), log_probabilities(student), 1 - skew)


def skew_reverse_kl(student: Tensor, teacher: Tensor, skew: float = 0.1) -> Tensor:
    r"""Compute the KL of a mixture of both from the student; a ``skew`` of 0 is :func:`reverse_kl`.

    .. math:: \mathrm{KL}\big(p^S \,\|\, (1 - \lambda) p^T + \lambda p^S\big), \qquad \lambda = skew

    Ko et al., ICML 2024; arguments as in :func:`skew_kl`.
    """
    return skew_kl(teacher, student, skew)


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    r"""Compute the generalised Jensen-Shannon divergence, divided by β(1 - β).

    .. math::
        \frac{1}{\beta (1 - \beta)} \Big( \beta\,\mathrm{KL}(p^T \| m) + (1 - \beta)\,\mathrm{KL}(p^S \| m) \Big),
        \qquad m = \beta p^T + (1 - \beta) p^S

    Undivided (Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024) it vanishes at both ends. Divided
    it tends to ``KL(teacher || student)`` for β → 0 and to ``KL(student || teacher)`` for β → 1, both of which it takes
    exactly at 0 and 1; and near the teacher it is the same for every β, so that a weight keeps its meaning. At β = 0.5
    it is four times the Jensen-Shannon divergence.

    Args:
        student: logits (..., C).
        teacher: logits of the same shape.
        beta: share of the teacher in the mixture, in [0, 1].

    Returns:
        (...) in nats.
    """
    if beta == 0:
        return kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    same_shape(student, teacher)
    p, q = log_probabilities(teacher), log_probabilities(student)
    return _kl_to_mixture(p, q, 1 - beta) / (1 - beta) + _kl_to_mixture(q, p, beta) / beta


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the total variation distance, half the summed difference of the probabilities, in [0, 1].

    .. math:: \tfrac12 \sum_c |p^T_{ic} - p^S_{ic}|

    Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*, ACL 2023. Shapes as in
    :func:`kl`.
    """
    same_shape(student, teacher)
    return (log_probabilities(teacher).exp() - log_probabilities(student).exp()).abs().sum(-1) / 2


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    r"""Compute the cross-entropy against class ids or soft targets; zero for a row without a label.

    .. math:: \mathrm{CE}_i = -\sum_c t_{ic} \log p_{ic}

    Args:
        logits: (B, C).
        targets: (B,) class ids with ``-100`` for no label, or (B, C) probabilities.
        label_smoothing: share of the target spread evenly over the classes that are not masked (Szegedy et al., CVPR
            2016).

    Returns:
        (B,) in nats.
    """
    if targets.ndim == 1:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        hard = F.cross_entropy(wide, targets, ignore_index=NO_LABEL, reduction="none")
        if not label_smoothing:
            return hard
        labelled = targets != NO_LABEL
    else:
        # F.cross_entropy makes 0 * -inf of a masked class, and smooths a row without a label into one with
        log_p = log_probabilities(logits)
        hard = -(targets.to(log_p.dtype) * log_p).sum(-1)
        if not label_smoothing:
            return hard
        labelled = targets.sum(-1) > 0
    return (1 - label_smoothing) * hard + label_smoothing * torch.where(labelled, _even_cross_entropy(logits), 0.0)


def _even_cross_entropy(logits: Tensor) -> Tensor:
    """Compute the cross-entropy (B,) with targets that are equal for all classes that are not masked."""
    log_p = log_probabilities(logits)
    masked = masked_classes(logits)
    return -log_p.masked_fill(masked, 0.0).sum(-1) / (~masked).sum(-1).clamp(min=1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference over everything but the first dimension: (B, ...) -> (B,)."""
    same_shape(student, teacher)
    wide = torch.promote_types(student.dtype, torch.float32)
    return (student.to(wide) - teacher.to(wide)).pow(2).flatten(1).mean(1)


def logit_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of logits over the classes that neither masks: (B, C) -> (B,)."""
    same_shape(student, teacher)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    masked = masked_classes(student) | masked_classes(teacher)
    # both filled before the difference: inf - inf is NaN, and a NaN that is masked afterwards still has a gradient
    gap = student.to(wide).masked_fill(masked, 0.0) - teacher.to(wide).masked_fill(masked, 0.0)
    return gap.square().sum(-1) / (~masked).sum(-1).clamp(min=1)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Compute z-scores of each row of logits: (B, C) -> (B, C) with mean 0 and (population) standard deviation 1.

    Masked classes (``-inf``) have no part in mean and deviation, and stay masked. Sun et al., *Logit Standardization in
    Knowledge Distillation*, CVPR 2024. The authors' code divides the squares by C - 1 (the sample deviation), here by
    C, as the paper's bound of :math:`\sqrt{C - 1}` on a z-score requires. A temperature of b here is theirs of
    :math:`b \sqrt{C / (C - 1)}`, and the gradient is larger by a factor of 1.01 at C = 100, 1.12 at 10, 1.48 at 3 and
    2.7 at 2.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    masked = masked_classes(logits)
    count = (~masked).sum(-1, keepdim=True).clamp(min=1)
    known = logits.masked_fill(masked, 0.0)
    gap = (known - known.sum(-1, keepdim=True) / count).masked_fill(masked, 0.0)
    # of a row of equal logits the root has no slope, and would make NaN of 0 times inf
    variance = gap.square().sum(-1, keepdim=True) / count
    flat = variance == 0
    deviation = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
    return (gap / (deviation + eps)).masked_fill(masked, float("-inf"))
