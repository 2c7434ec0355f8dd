"""A game against the student: whoever tells it from the teacher teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, dense, masked_classes, reverse_gradient
from kdlab.losses.term import Term
from kdlab.ranges import at_least_zero


class Discriminator(Term):
    r"""Adversarial term: a small network learns to tell teacher from student, and the student to be taken for it.

    .. math:: -\tfrac12 \Big( \log D(z^T) + \log\big(1 - D(z^S)\big) \Big)

    D minimises it; the student's gradient is its reverse, times ``strength``, so that one backward pass trains both
    (Ganin & Lempitsky, *Unsupervised Domain Adaptation by Backpropagation*, ICML 2015). On logits: the adversarial part
    of Xu, Hsu & Huang, *Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with Conditional
    Adversarial Networks*, ICLR 2018 workshop, whose D also names the class. At log 2, D cannot tell them apart.

    On a pair of layers: their outputs, averaged over positions; a student of another width goes through a linear map
    that trains with it. D and that map are no part of the student.

    Args:
        hidden: widths of the discriminator's hidden layers.
        strength: factor of the reversed gradient.
        student_layer: module path in the student; None for the logits.
        teacher_layer: module path in the teacher; None for the logits.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: for an argument out of its range, or a layer without its pair.
    """

    def __init__(
        self,
        hidden: list[int] | tuple[int, ...] = (64, 64),
        strength: float = 0.1,
        student_layer: str | None = None,
        teacher_layer: str | None = None,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in hidden):
            raise UserError("hidden", f"{list(hidden)}", "whole numbers, at least 1")
        at_least_zero("strength", strength)
        if (student_layer is None) != (teacher_layer is None):
            raise UserError("student_layer, teacher_layer", f"{student_layer} and {teacher_layer}", "both, or neither")
        self.hidden, self.strength = tuple(hidden), strength
        self.student_layers = () if student_layer is None else (student_layer,)
        self.teacher_layers = () if teacher_layer is None else (teacher_layer,)
        self.rowwise = student_layer is None
        self.judge: nn.Module | None = None
        self.fit: nn.Module = nn.Identity()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        if self.judge is not None:
            return
        assert teacher is not None
        student_output, teacher_output = (
            self._said(student, self.student_layers),
            self._said(teacher, self.teacher_layers),
        )
        widths = [teacher_output.shape[-1], *self.hidden]
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        self.judge = nn.Sequential(*layers, nn.Linear(widths[-1], 1)).to(teacher_output.device)
        if student_output.shape[-1] != widths[0]:
            self.fit = nn.Linear(student_output.shape[-1], widths[0], device=student_output.device)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if self.judge is None:
            raise UserError(
                "Discriminator", "call prepare(student, teacher) once before training, to make its networks"
            )
        wide = next(self.judge.parameters()).dtype
        student_output = reverse_gradient(self.fit(self._said(student, self.student_layers).to(wide)), self.strength)
        teacher_output = self._said(teacher, self.teacher_layers).detach().to(wide)
        real, fake = self.judge(teacher_output).squeeze(-1), self.judge(student_output).squeeze(-1)
        real, fake = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (real, fake))
        return (F.softplus(-real) + F.softplus(fake)) / 2

    @staticmethod
    def _said(outputs: Outputs, layers: tuple[str, ...]) -> Tensor:
        """Return the logits, 0 where a class is masked, or a layer's output averaged over positions: (rows, width)."""
        if not layers:
            logits = dense(outputs.logits)
            return logits.masked_fill(masked_classes(logits), 0.0)
        if layers[0] not in outputs.features:
            raise UserError("layer", f"no output of {layers[0]!r} was captured", "a layer's module path")
        feature = outputs.features[layers[0]]
        return feature if feature.ndim == 2 else feature.flatten(2).mean(-1) if feature.ndim == 4 else feature.mean(1)
