"""Multi-level logit distillation: instances, batch and classes at several temperatures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    batch_gram_distance,
    class_gram_distance,
    dense,
    kl,
)
from kdlab.losses.response.dist import counted
from kdlab.losses.temperature import Temperature
from kdlab.losses.term import Role, Term


class _MultiLevel(Term):
    """Base of one level of multi-level logit distillation: a distance, summed over several temperatures.

    Args:
        temperatures: temperatures, each above 0; the paper's are 2 to 6.
        weight: see :class:`~kdlab.losses.Term`.
    """

    role: Role = "soft"

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        values = [temperatures] if isinstance(temperatures, int | float) else list(temperatures)
        if not values or not all(isinstance(t, int | float) and 0 < t < math.inf for t in values):
            raise UserError("temperatures", values, "numbers above 0, at least one")
        self.temperatures = nn.ModuleList(Temperature(t) for t in values)

    def distance(self, student: Tensor, teacher: Tensor, squared: float | Tensor) -> Tensor:
        """Return the distance of softened logits (rows, C), at the temperature whose square is given."""
        raise TypeError(f"{type(self).__name__} does not say what it measures: define distance")

    def summed(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of logits (rows, C), summed over all temperatures."""
        each = [self.distance(*temperature.soften(student, teacher)) for temperature in self.temperatures]  # type: ignore[operator]
        return torch.stack(each).sum(0)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.summed(dense(student.logits), dense(teacher.logits))


class MLLDInstance(_MultiLevel):
    r"""Multi-level logit distillation, instance level: KL times T², summed over several temperatures.

    .. math:: \sum_T T^2\,\mathrm{KL}(p^T_i(T) \| p^S_i(T))

    Jin, Wang & Lin, *Multi-Level Logit Distillation*, CVPR 2023. Their code adds a second, strongly augmented view of
    each picture, which is a matter of the data here.
    """

    rowwise = True

    @override
    def distance(self, student: Tensor, teacher: Tensor, squared: float | Tensor) -> Tensor:
        return squared * kl(student, teacher)


class MLLDBatch(_MultiLevel):
    r"""Multi-level logit distillation, batch level: similarity of rows, over several temperatures; one value per row.

    .. math:: \sum_T \sum_j \big(\langle p^S_i, p^S_j \rangle - \langle p^T_i, p^T_j \rangle\big)^2

    whose mean over the B rows is the paper's :math:`\tfrac1B \|G^S - G^T\|_F^2`. Rows interact: a step that is split
    into micro-batches compares the rows of each alone. Without T², as published. Jin, Wang & Lin, CVPR 2023.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor, squared: float | Tensor) -> Tensor:
        return batch_gram_distance(student, teacher)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if batch.weight is None:
            return super().forward(student, teacher, batch)
        distances = self.summed(*counted(batch, dense(student.logits), dense(teacher.logits)))
        return distances.new_zeros(len(batch)).masked_scatter(batch.weight > 0, distances)


class MLLDClass(_MultiLevel):
    r"""Multi-level logit distillation, class level: similarity of classes, over several temperatures; a scalar.

    .. math:: \sum_T \tfrac1C \big\| P^S(T)^\top P^S(T) - P^T(T)^\top P^T(T) \big\|_F^2

    with P (B, C) the probabilities of the micro-batch. As published it sums over the rows, so that it grows with the
    square of the micro-batch's size. Without T², as published. Jin, Wang & Lin, CVPR 2023.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor, squared: float | Tensor) -> Tensor:
        return class_gram_distance(student, teacher)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.summed(*counted(batch, dense(student.logits), dense(teacher.logits)))
