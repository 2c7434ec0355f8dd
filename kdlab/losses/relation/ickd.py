"""ICKD-C: correlations of the channels of one example."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    channel_correlation,
)
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only, project, projector


class ChannelCorrelation(LayerTerm):
    r"""ICKD: the correlations of an example's channels, (B, C, H, W) features; one value per row.

    .. math:: \tfrac1C \| G^S - G^T \|_F^2, \qquad G_{c:} = F F^\top_{c:} / \| F F^\top_{c:} \|_2

    summed over the pairs. The student's channels become as many as the teacher's by a 1×1 convolution, which trains and
    is no part of the student. Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation*, ICCV 2021, whose code has a BatchNorm after it; see
    :func:`~kdlab.functional.relation.ickd.channel_correlation`.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projectors = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        pairs = self.captured(student, teacher)
        maps_only(pairs, "inter-channel correlation")
        if not self.projectors:
            self.projectors.extend(projector(s, t) for s, t in pairs)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.captured(student, teacher)
        if not self.projectors:
            raise UserError(
                "ChannelCorrelation", "call prepare(student, teacher) once before training, to make its projector"
            )
        each = zip(self.projectors, pairs, strict=True)
        return torch.stack([channel_correlation(project(s, with_=p), t) for p, (s, t) in each]).sum(0)
