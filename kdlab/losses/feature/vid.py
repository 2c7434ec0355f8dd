"""VID: a Gaussian around what the student's feature predicts of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, gaussian_nll
from kdlab.losses.feature.layer_term import Layers, LayerTerm, project


class VID(LayerTerm):
    r"""Variational bound of the mutual information of the student's feature and the teacher's.

    .. math:: -\log q(F^T \mid F^S) \quad\text{with}\quad q = N\big(\mu(F^S),\, \mathrm{softplus}(a_c) + \epsilon\big)

    of :func:`~kdlab.functional.gaussian_nll`, summed over the pairs. The regressor :math:`\mu` (three 1×1 convolutions,
    or linear maps for vectors) and the channels' variances train with the student. Ahn et al., *Variational Information
    Distillation for Knowledge Transfer*, CVPR 2019.

    Args:
        student_layer: module path in the student, or several.
        teacher_layer: module path in the teacher, or as many.
        variance: initial variance of every channel.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: if ``variance`` is not above the least one, 1e-5.
    """

    LEAST = 1e-5
    """Least variance, ε."""

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        variance: float = 5.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if not self.LEAST < variance < math.inf:
            raise UserError("variance", variance, f"a finite number above {self.LEAST:g}")
        self.variance = variance
        self.regressors, self.scales = nn.ModuleList(), nn.ParameterList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.regressors:
            return
        begin = self.variance - self.LEAST
        raw = begin + math.log(-math.expm1(-begin))  # the inverse of softplus, which does not overflow
        for s, t in self.pairs(student, teacher):
            maps = s.ndim == 4
            student_width, teacher_width = (s.shape[1], t.shape[1]) if maps else (s.shape[-1], t.shape[-1])
            self.regressors.append(_regressor(student_width, teacher_width, maps).to(s.device))
            scale = nn.Parameter(torch.full((teacher_width,), raw, device=s.device))
            scale.no_decay = True  # type: ignore[attr-defined]
            self.scales.append(scale)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        if not self.regressors:
            raise UserError("VID", "call prepare(student, teacher) once before training, to make its regressors")
        each = zip(pairs, self.regressors, self.scales, strict=True)
        losses = [gaussian_nll(project(s, with_=mu), F.softplus(a) + self.LEAST, t) for (s, t), mu, a in each]
        return torch.stack(losses).sum(0)


def _regressor(inputs: int, outputs: int, maps: bool) -> nn.Sequential:
    def layer(a: int, b: int) -> nn.Module:
        return nn.Conv2d(a, b, 1, bias=False) if maps else nn.Linear(a, b, bias=False)

    return nn.Sequential(layer(inputs, outputs), nn.ReLU(), layer(outputs, outputs), nn.ReLU(), layer(outputs, outputs))
