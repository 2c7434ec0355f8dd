"""A term of the objective: a configured use of a pure function, one value per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, schedule

Role = Literal["label", "soft", "other"]
Rows = Literal["labelled", "all", "partnered"]

LEAST_WEIGHT, GREATEST_WEIGHT = 1e-12, 1e12
"""Bounds of weights: beyond, the squared gradients that Adam keeps overflow, or its epsilon swallows the step."""


class Term(nn.Module):
    """Base of the terms of a loss.

    ``term(student, teacher, batch)`` returns one value per row (rows,), or a scalar where rows interact. A term
    never averages, and never weighs itself: the :class:`~kdlab.losses.Objective` does both. It works in any training
    loop: it needs outputs and a batch, nothing else.

    Args:
        weight: a number, or a schedule ``{start, end, shape}`` over training.
    """

    role: Role = "other"
    """Role of the weight: ``label`` terms weigh (1 - alpha), ``soft`` ones alpha, ``other`` their own weight alone."""
    rows: Rows = "all"
    """Rows that the values count over: those with a label, all valid ones, or those with a partner."""
    needs_teacher: bool = True
    rowwise: bool = False
    """Whether each value depends on nothing but that row's logits, heads, target, weight and segment. Such a term is
    called on chunks of rows where logits come as :class:`~kdlab.functional.Projected`, or are many, and needs no code
    for it."""
    single_task_only: bool = False
    """Whether it looks at layers and at an output, of which several tasks have several."""
    vocabulary_agnostic: bool = False
    """Whether it can compare with a teacher that has other classes than the student."""
    auxiliary: str = ""
    """The :attr:`~kdlab.models.transforms.auxiliary.Auxiliary.kind` that must train beside the student for it;
    empty for none."""
    pairing: str = ""
    """Arrangement of rows that it needs, a :data:`~kdlab.data.order.Pairing`; empty for any."""
    student_layers: tuple[str, ...] = ()
    """Module paths whose outputs the term wants in ``student.features``."""
    teacher_layers: tuple[str, ...] = ()

    def __init__(self, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__()
        self.weight = schedule(weight, "weight", least=0.0, most=GREATEST_WEIGHT)
        if 0 < self.weight.range[1] < LEAST_WEIGHT:
            raise UserError("weight", f"{self.weight.range[1]:g}", f"0, or at least {LEAST_WEIGHT:g}")

    def setup(self, student: nn.Module, teacher: nn.Module | None, examples: int | None) -> None:
        """See the networks themselves, and how many examples the training split has; called once, before ``prepare``.

        For terms that use a part of the teacher (its classifier) or remember every example. None where there is no
        teacher whose inside can be seen, or nobody counted. What is kept of a network must stay outside of the term's
        own modules (in a tuple, say), or it would be trained and saved with it.
        """

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make what depends on shapes (a projector); called once, before the optimizer is made."""

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say what it measures: define forward")


class LabelTerm(Term):
    """Base of the terms against the labels, which count over labelled rows, and weigh (1 - alpha)."""

    role: Role = "label"
    rows: Rows = "labelled"
    needs_teacher = False
