"""Base of the terms on outputs of layers: pairs of layers, and projectors between their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdlab.errors import UserError
from kdlab.functional import Outputs, Schedule
from kdlab.losses.term import Term


def layer_of(outputs: Outputs | None, name: str, key: str) -> Tensor:
    """Return the captured output of a layer.

    Raises:
        UserError: naming ``key``, if it was not captured.
    """
    if outputs is None or name not in outputs.features:
        raise UserError(key, f"no output of layer {name!r} was captured", "a layer's module path")
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
            "student_layer, teacher_layer",
            f"outputs of {student.ndim} and {teacher.ndim} dimensions",
            "a pair of the same kind",
        )
    if student.ndim == 4:
        student, teacher = (
            _fit_grid(student, _least(student, teacher)),
            _fit_grid(teacher, _least(student, teacher)),
        )
    elif student.shape[1:-1] != teacher.shape[1:-1]:
        raise UserError(
            "student_layer, teacher_layer",
            f"outputs of shape {tuple(student.shape)} and {tuple(teacher.shape)}",
            "a pair that differs in width alone",
        )
    return student, teacher


def _least(a: Tensor, b: Tensor) -> Tensor:
    return a if a.shape[2] * a.shape[3] <= b.shape[2] * b.shape[3] else b


Layers = str | Sequence[str]
"""Module path, or several."""


class LayerTerm(Term):
    """Base of the terms on pairs of layers, named by module path.

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
                "student_layer, teacher_layer",
                f"{len(self.student_layers)} and {len(self.teacher_layers)} layers",
                "pairs, at least one",
            )

    def captured(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """Return the features of each pair, as the layers gave them."""
        return [
            (layer_of(student, student_layer, "student_layer"), layer_of(teacher, teacher_layer, "teacher_layer"))
            for student_layer, teacher_layer in zip(self.student_layers, self.teacher_layers, strict=True)
        ]

    def pairs(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """Return the features of each pair, on the coarser of their grids."""
        return [_common_grid(s, t) for s, t in self.captured(student, teacher)]


def paths(layers: Layers) -> tuple[str, ...]:
    """Return module paths as a tuple, given one or several."""
    return (layers,) if isinstance(layers, str) else tuple(layers)


def projector(student: Tensor, teacher: Tensor) -> nn.Module:
    """Build a trainable map from one feature's width to another's: a 1×1 convolution, or a linear map."""
    if student.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1, device=student.device)
    return nn.Linear(student.shape[-1], teacher.shape[-1], device=student.device)


def project(feature: Tensor, with_: nn.Module) -> Tensor:
    """Pass a feature through a projector, in the projector's precision (a student's may be another)."""
    return with_(feature.to(next(with_.parameters()).dtype))


def maps_only(pairs: Iterable[tuple[Tensor, Tensor]], who: str) -> None:
    """Refuse layers that give no feature maps.

    Args:
        pairs: the captured features.
        who: the method that wants them, for the message.

    Raises:
        UserError: if one is no (B, C, H, W).
    """
    if any(s.ndim != 4 or t.ndim != 4 for s, t in pairs):
        raise UserError("student_layer, teacher_layer", f"{who} takes feature maps (B, C, H, W)")
