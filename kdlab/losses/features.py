"""Terms on the outputs of layers inside teacher and student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, attention_map, squared_error
from kdlab.losses.term import Term


def _layer(outputs: Outputs | None, name: str, key: str) -> Tensor:
    if outputs is None or name not in outputs.features:
        raise UserError(f"{key}: no output of layer {name!r} was captured; accepted: a layer's module path")
    return outputs.features[name]


def _fit_grid(feature: Tensor, like: Tensor) -> Tensor:
    """Bring (B, C, H, W) to the grid of ``like``, which is the smaller of the two."""
    return (
        feature
        if feature.shape[2:] == like.shape[2:]
        else F.adaptive_avg_pool2d(feature, (like.shape[2], like.shape[3]))
    )


def _common_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != teacher.ndim:
        raise UserError(
            f"student_layer, teacher_layer: outputs of {student.ndim} and {teacher.ndim} dimensions; accepted: "
            "a pair of the same kind"
        )
    if student.ndim == 4:
        student, teacher = (
            _fit_grid(student, _least(student, teacher)),
            _fit_grid(teacher, _least(student, teacher)),
        )
    elif student.shape[1:-1] != teacher.shape[1:-1]:
        raise UserError(
            f"student_layer, teacher_layer: outputs of shape {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "accepted: a pair that differs in width alone"
        )
    return student, teacher


def _least(a: Tensor, b: Tensor) -> Tensor:
    return a if a.shape[2] * a.shape[3] <= b.shape[2] * b.shape[3] else b


class LayerTerm(Term):
    """A term on one pair of layers, named by module path.

    Args:
        student_layer: module path in the student, such as ``layer2``.
        teacher_layer: module path in the teacher.
        weight: see :class:`~kdlab.losses.Term`.
    """

    def __init__(self, student_layer: str, teacher_layer: str, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight)
        self.student_layers, self.teacher_layers = (student_layer,), (teacher_layer,)

    def pair(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """The two features, on the coarser of their grids."""
        s = _layer(student, self.student_layers[0], "student_layer")
        t = _layer(teacher, self.teacher_layers[0], "teacher_layer")
        return _common_grid(s, t)


class Hint(LayerTerm):
    r"""FitNets' hint: the student's feature, through a trained projector, against the teacher's.

    .. math:: \tfrac{1}{n}\,\| r(F^S_i) - F^T_i \|^2

    averaged over the n elements of a row's feature. The projector r is a 1×1 convolution (feature maps) or a linear
    map (vectors), made to fit; it trains, and is no part of the student. Romero et al., *FitNets: Hints for Thin Deep
    Nets*, ICLR 2015.
    """

    def __init__(self, student_layer: str, teacher_layer: str, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projector: nn.Module | None = None

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        s, t = self.pair(student, teacher)
        if self.projector is None:
            if s.ndim == 4:
                self.projector = nn.Conv2d(s.shape[1], t.shape[1], 1, device=s.device)
            else:
                self.projector = nn.Linear(s.shape[-1], t.shape[-1], device=s.device)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        if self.projector is None:
            raise UserError("Hint: call prepare(student, teacher) once before training, to make its projector")
        return squared_error(self.projector(s.to(next(self.projector.parameters()).dtype)), t)


class AttentionTransfer(LayerTerm):
    r"""Squared distance of the two normalised spatial attention maps, (B, C, H, W) features.

    .. math:: \| Q^S_i / \|Q^S_i\| - Q^T_i / \|Q^T_i\| \|_2^2 / (H W), \qquad Q = \tfrac1C\sum_c |F_c|^2

    The mean over positions and the published weight of 1,000 are those of the authors' code. Zagoruyko & Komodakis,
    *Paying More Attention to Attention*, ICLR 2017.
    """

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.pair(student, teacher)[0].ndim != 4:
            raise UserError("student_layer, teacher_layer: attention transfer takes feature maps (B, C, H, W)")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        return torch.mean((attention_map(s) - attention_map(t)).pow(2), dim=1)
