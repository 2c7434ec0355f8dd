"""KL divergence in two parts: the target class, and the other classes among themselves (DKD)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.response.divergence import log_probabilities, masked_classes, same_shape


def decoupled_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split KL into its parts for the target class and for the other classes.

    .. math::
        \mathrm{TCKD}_i = \mathrm{KL}(b^T_i \| b^S_i), \qquad
        \mathrm{NCKD}_i = \mathrm{KL}(\hat p^T_i \| \hat p^S_i)

    with :math:`b` the two probabilities (target, everything else) and :math:`\hat p` the distribution over the
    other classes alone, so that :math:`\mathrm{KL} = \mathrm{TCKD} + (1 - p^T_t)\,\mathrm{NCKD}`.

    Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022. NCKD is 0 in a row in which student or teacher leave no
    probability at all to the other classes (all are masked), since there is no distribution to compare.

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        targets: (B,) class ids, each in [0, C).

    Returns:
        TCKD and NCKD, (B,) each, in nats.
    """
    same_shape(student, teacher)
    at = F.one_hot(targets, student.shape[-1]).bool()
    alone = ((masked_classes(student) | at).all(-1) | (masked_classes(teacher) | at).all(-1))[:, None]

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_probabilities(logits)
        target = log_p[at]
        # log of the summed probability of the others; 1 - p would lose it where p is close to 1
        rest = log_p.masked_fill(at, torch.finfo(log_p.dtype).min).logsumexp(-1)
        # a row of nothing but -inf has no softmax, and its NaN would reach the gradient of every row that is summed
        others = log_probabilities(logits.masked_fill(at, float("-inf")).masked_fill(alone, 0.0))
        return torch.stack([target, rest], -1), others.masked_fill(at | alone, 0.0)

    (binary_s, others_s), (binary_t, others_t) = parts(student), parts(teacher)
    tckd = (binary_t.exp() * (binary_t - binary_s)).sum(-1)
    p = others_t.exp().masked_fill(at | alone, 0.0)
    return tckd, (p * (others_t - others_s)).sum(-1)
