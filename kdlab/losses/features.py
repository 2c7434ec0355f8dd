"""Terms on the outputs of layers inside teacher and student."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, attention_map, squared_error
from kdlab.losses.term import Term


def layer_of(outputs: Outputs | None, name: str, key: str) -> Tensor:
    """The captured output of a layer.

    Raises:
        UserError: naming ``key``, if it was not captured.
    """
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


Layers = str | Sequence[str]
"""A module path, or several."""


class LayerTerm(Term):
    """A term on pairs of layers, named by module path.

    Args:
        student_layer: module path in the student, such as ``layer2``, or several.
        teacher_layer: module path in the teacher, or as many.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: if they are not as many.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight)
        self.student_layers, self.teacher_layers = paths(student_layer), paths(teacher_layer)
        if len(self.student_layers) != len(self.teacher_layers) or not self.student_layers:
            raise UserError(
                f"student_layer, teacher_layer: {len(self.student_layers)} and {len(self.teacher_layers)} layers; "
                "accepted: pairs, at least one"
            )

    def captured(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """The features of each pair, as the layers gave them."""
        return [
            (layer_of(student, ours, "student_layer"), layer_of(teacher, theirs, "teacher_layer"))
            for ours, theirs in zip(self.student_layers, self.teacher_layers, strict=True)
        ]

    def pairs(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """The features of each pair, on the coarser of their grids."""
        return [_common_grid(s, t) for s, t in self.captured(student, teacher)]


def paths(layers: Layers) -> tuple[str, ...]:
    """Module paths, of one or of several."""
    return (layers,) if isinstance(layers, str) else tuple(layers)


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

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if not self.projectors:
            self.projectors.extend(projector(s, t) for s, t in self.pairs(student, teacher))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        if not self.projectors:
            raise UserError("Hint: call prepare(student, teacher) once before training, to make its projector")
        each = zip(self.projectors, pairs, strict=True)
        return torch.stack([squared_error(project(s, with_=p), t) for p, (s, t) in each]).sum(0)


def projector(student: Tensor, teacher: Tensor) -> nn.Module:
    """A trainable map from the width of one feature to that of another: a 1×1 convolution, or a linear map."""
    if student.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1, device=student.device)
    return nn.Linear(student.shape[-1], teacher.shape[-1], device=student.device)


def project(feature: Tensor, with_: nn.Module) -> Tensor:
    """A feature through a projector, in the projector's precision (a student's may be another)."""
    return with_(feature.to(next(with_.parameters()).dtype))


class AttentionTransfer(LayerTerm):
    r"""Squared distance of the two normalised spatial attention maps, (B, C, H, W) features.

    .. math:: \| Q^S_i / \|Q^S_i\| - Q^T_i / \|Q^T_i\| \|_2^2 / (H W), \qquad Q = \tfrac1C\sum_c |F_c|^2

    summed over the pairs. The mean over positions and the published weight of 1,000 are those of the authors' code.
    Zagoruyko & Komodakis, *Paying More Attention to Attention*, ICLR 2017.
    """

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), "attention transfer")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return torch.stack([(attention_map(s) - attention_map(t)).pow(2).mean(1) for s, t in pairs]).sum(0)


def maps_only(pairs: Iterable[tuple[Tensor, Tensor]], who: str) -> None:
    """Refuse layers that give no feature maps.

    Args:
        pairs: the captured features.
        who: the method that wants them, for the message.

    Raises:
        UserError: if one is no (B, C, H, W).
    """
    if any(s.ndim != 4 or t.ndim != 4 for s, t in pairs):
        raise UserError(f"student_layer, teacher_layer: {who} takes feature maps (B, C, H, W)")
