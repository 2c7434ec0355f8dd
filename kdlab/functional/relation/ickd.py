"""Correlations of channels within one example (ICKD-C)."""

from __future__ import annotations

from torch import Tensor

from kdlab.functional.relation.relation import in_float32, unit


@in_float32
def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the distance of the student's correlations of channels from the teacher's by row: (B, C, H, W) → (B,).

    .. math:: \tfrac1C \| G^S - G^T \|_F^2, \qquad G_{c:} = F F^\top_{c:} / \| F F^\top_{c:} \|_2

    with F (C, HW) the channels of one example. Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved
    Knowledge Distillation*, ICCV 2021 (ICKD-C). Rows of unit length, and C where the paper divides by C², are those of
    the authors' code.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H', W'): as many channels, any grid.

    Raises:
        ValueError: if the channels differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"student and teacher differ in channels: {student.shape[1]} and {teacher.shape[1]}")

    def correlations(feature: Tensor) -> Tensor:
        channels = feature.flatten(2)
        return unit(channels @ channels.mT)

    return (correlations(student) - correlations(teacher)).square().sum(2).mean(1)
