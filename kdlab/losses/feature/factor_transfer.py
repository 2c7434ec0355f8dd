"""Factor transfer: a paraphrased teacher feature, and a translated student feature."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, factor_distance, squared_error
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only, project
from kdlab.models.vision.blocks import BatchNorm
from kdlab.ranges import positive, share


class FactorTransfer(LayerTerm):
    r"""Distance of the student's translated feature from the factors to which a paraphraser reduces the teacher's.

    .. math::
        \sum_{pairs} d\big(\mathrm{translate}(F^S),\, \mathrm{sg}[\mathrm{encode}(F^T)]\big)
        + r\, \tfrac1n \big\| \mathrm{decode}(\mathrm{encode}(F^T)) - F^T \big\|^2

    with d of :func:`~kdlab.functional.factor_distance` and sg a stop of the gradient, so that the student learns by the
    first part alone and the paraphraser, an auto-encoder of the teacher's feature, by the second alone. Kim et al.,
    *Paraphrasing Complex Network: Network Compression via Factor Transfer*, NeurIPS 2018.

    The paper trains the paraphraser first. Here both train in one fit: the student does not follow before ``begin``,
    and the paraphraser goes on afterwards. The curve is the sum of both parts throughout. The networks are those of the
    authors' code, with a BatchNorm after each convolution, which that leaves out.

    Args:
        student_layer: module path of feature maps in the student, or several.
        teacher_layer: module path in the teacher, or as many.
        rate: factors per channel of the teacher (the paper's k).
        begin: share of training in [0, 1) during which the paraphraser trains alone.
        reconstruction: r; only the paraphraser sees it. With ``weight`` it sets how fast that learns.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: if an argument is out of its range.
    """

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        rate: float = 0.5,
        begin: float = 0.1,
        reconstruction: float = 1.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        positive("rate", rate)
        share("begin", begin, one=False)
        positive("reconstruction", reconstruction)
        self.rate, self.begin, self.reconstruction = rate, begin, reconstruction
        self.progress = 1.0  # without an Objective nobody says how far training is: both parts count
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), "factor transfer")
        if self.encoders:
            return
        for s, t in self.pairs(student, teacher):
            student_width, teacher_width = s.shape[1], t.shape[1]
            factors = max(round(self.rate * teacher_width), 1)
            self.encoders.append(_convolutions(teacher_width, teacher_width, factors, factors).to(t.device))
            self.decoders.append(_convolutions(factors, factors, teacher_width, teacher_width).to(t.device))
            self.translators.append(_convolutions(student_width, student_width, factors, factors).to(s.device))

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        if not self.encoders:
            raise UserError(
                "FactorTransfer", "call prepare(student, teacher) once before training, to make its networks"
            )
        distances = []
        for (s, t), encode, decode, translate in zip(
            pairs, self.encoders, self.decoders, self.translators, strict=True
        ):
            factor = project(t.detach(), with_=encode)
            distance = factor_distance(project(s, with_=translate), factor.detach())
            if self.progress < self.begin:
                distance = distance.detach()
            distances.append(distance + self.reconstruction * squared_error(project(factor, with_=decode), t.detach()))
        return torch.stack(distances).sum(0)


def _convolutions(*widths: int) -> nn.Sequential:
    """Build 3×3 convolutions from width to width, each with BatchNorm and a leaky ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            BatchNorm(outputs),
            nn.LeakyReLU(0.1),
        ]
    return nn.Sequential(*layers)
