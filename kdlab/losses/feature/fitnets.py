"""FitNets: hints, the squared difference of projected features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, squared_error
from kdlab.losses.feature.layer_term import Layers, LayerTerm, project, projector


class Hint(LayerTerm):
    r"""FitNets' hint: the student's feature, through a trained projector, against the teacher's.

    .. math:: \tfrac{1}{n}\,\| r(F^S_i) - F^T_i \|^2

    averaged over the n elements of a row's feature, summed over the pairs. The projector r of each pair is a 1×1
    convolution (feature maps) or a linear map (vectors), made to fit; it trains, and is no part of the student. Romero
    et al., *FitNets: Hints for Thin Deep Nets*, ICLR 2015.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projectors = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if not self.projectors:
            self.projectors.extend(projector(s, t) for s, t in self.pairs(student, teacher))

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        if not self.projectors:
            raise UserError("Hint", "call prepare(student, teacher) once before training, to make its projector")
        each = zip(self.projectors, pairs, strict=True)
        return torch.stack([squared_error(project(s, with_=p), t) for p, (s, t) in each]).sum(0)
