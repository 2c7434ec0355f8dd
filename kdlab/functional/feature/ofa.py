"""The teacher's probabilities as a target that trusts it more where it is sure of the right class."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.response.divergence import log_probabilities


def enhanced_target(student: Tensor, teacher: Tensor, targets: Tensor, gamma: float = 1.0) -> Tensor:
    r"""Compute OFA-KD's loss: cross-entropy with label and teacher, whose share of the target class is enhanced.

    .. math:: -\big(1 + p^T_{\hat c}\big)^{\gamma} \log p^S_{\hat c} - \sum_{c \ne \hat c} p^T_c \log p^S_c

    With gamma = 1 it is the cross-entropy with the label :math:`\hat c` plus that with the teacher; above, a teacher
    that is sure of the label counts for more, and what it says about other classes for less. Least where :math:`p^S`
    is in proportion to the weights of the logarithms, and above 0 there.

    Hao et al., *One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation*, NeurIPS
    2023. (The authors' code raises the other classes' probabilities to the power of gamma too, and leaves out the
    label's cross-entropy.)

    Args:
        student: logits (B, C).
        teacher: logits of the same shape.
        targets: (B,) class ids, each in [0, C).
        gamma: exponent of the target class's weight, at least 1 in the paper.

    Returns:
        (B,) in nats, in at least float32.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    p = log_probabilities(teacher).exp()
    at = F.one_hot(targets, student.shape[-1]).bool()
    weights = p.where(~at, (1 + p).pow(gamma))
    return -(weights * log_probabilities(student)).sum(-1)
