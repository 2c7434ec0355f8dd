"""FSP: products of the channels of two layers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, fsp_matrix, squared_error
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only, project, projector


class FSP(LayerTerm):
    r"""Flow from layer to layer: squared distance of the two networks' matrices between each layer and the next.

    .. math:: \sum_k \frac{1}{m n} \big\| G(F^S_k, F^S_{k+1}) - G(F^T_k, F^T_{k+1}) \big\|_2^2

    with G of :func:`~kdlab.functional.fsp_matrix`, an m×n matrix. Yim et al., *A Gift from Knowledge Distillation: Fast
    Optimization, Network Minimization and Transfer Learning*, CVPR 2017. The paper sums over the matrix, has networks
    of the same widths, and transfers before it trains; the mean is that of Tian et al.'s code (ICLR 2020).

    Args:
        student_layer: module paths in the student, at least two, in the order of the network.
        teacher_layer: module paths in the teacher, as many.
        widen: bring a student's layer to the teacher's width, where they differ and matrices cannot be compared, by a
            trained 1×1 convolution, which the paper does not have. False refuses such layers.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: with less than two layers, or (from ``prepare``) widths that differ and ``widen`` false.
    """

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        widen: bool = True,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) < 2:
            raise UserError(
                "student_layer",
                f"{', '.join(self.student_layers)}",
                "at least two layers, in order: an FSP matrix is between two",
            )
        self.widen = widen
        self.projectors = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        layers = self.captured(student, teacher)
        maps_only(layers, "FSP")
        for (s, t), student_layer, teacher_layer in zip(layers, self.student_layers, self.teacher_layers, strict=True):
            if s.shape[1] != t.shape[1] and not self.widen:
                raise UserError(
                    "widen",
                    (
                        f"false, and {student_layer} of the student has {s.shape[1]} channels, {teacher_layer} of the "
                        f"teacher {t.shape[1]}"
                    ),
                    "layers of the same width, or widen=true",
                )
        if not self.projectors:
            self.projectors.extend(nn.Identity() if s.shape[1] == t.shape[1] else projector(s, t) for s, t in layers)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        layers = self.captured(student, teacher)
        if not self.projectors:
            raise UserError("FSP", "call prepare(student, teacher) once before training, to make its projectors")
        student_maps = [
            s if isinstance(p, nn.Identity) else project(s, with_=p)
            for p, (s, _) in zip(self.projectors, layers, strict=True)
        ]
        flows = zip(pairwise(student_maps), pairwise(t for _, t in layers), strict=True)
        return torch.stack([squared_error(fsp_matrix(*s), fsp_matrix(*t)) for s, t in flows]).sum(0)
