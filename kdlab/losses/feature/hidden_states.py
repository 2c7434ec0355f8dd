"""Cosine distance of hidden states, as in DistilBERT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule
from kdlab.losses.feature.layer_term import Layers, LayerTerm, project, projector
from kdlab.losses.response.uld import picked_rows


class HiddenCosine(LayerTerm):
    r"""Cosine distance of the student's hidden states from the teacher's, row by row.

    .. math:: 1 - \frac{h^S_i \cdot h^T_i}{\|h^S_i\| \, \|h^T_i\|}

    Of sequences, (B, T, d) states are picked where ``batch.loss_mask`` says so. Where the widths differ, the student's
    pass through a trained linear map, which is no part of the student; several pairs are summed. Sanh et al.,
    *DistilBERT, a distilled version of BERT*, EMC² workshop at NeurIPS 2019, compare the last hidden states.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projectors = nn.ModuleDict()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        for i, (s, t) in enumerate(self.pairs(student, teacher)):
            if s.ndim not in (2, 3):
                raise UserError(
                    "student_layer, teacher_layer",
                    f"outputs of {s.ndim} dimensions",
                    "hidden states (rows, d) or (B, T, d)",
                )
            if str(i) not in self.projectors and s.shape[-1] != t.shape[-1]:
                self.projectors[str(i)] = projector(s, t)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return torch.stack([self._gap(i, s, t, batch) for i, (s, t) in enumerate(self.pairs(student, teacher))]).sum(0)

    def _gap(self, number: int, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return the cosine distances (rows,) of one pair of layers."""
        s, t = picked_rows(student, batch), picked_rows(teacher, batch)
        if str(number) in self.projectors:
            s = project(s, self.projectors[str(number)])
        elif s.shape[-1] != t.shape[-1]:
            raise UserError(
                "HiddenCosine", "call prepare(student, teacher) once before training, to make its projector"
            )
        wide = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
        return 1 - F.cosine_similarity(s.to(wide), t.to(wide), dim=-1)
