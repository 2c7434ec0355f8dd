"""Correlation congruence: correlations of examples by a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    Schedule,
    correlation_congruence,
)
from kdlab.losses.feature.layer_term import Layers
from kdlab.losses.relation.relation import Relation
from kdlab.ranges import positive, whole_number


class CorrelationCongruence(Relation):
    r"""CC: the correlations between examples by a Gaussian kernel, expanded by Taylor.

    .. math::
        \tfrac{1}{B^2} \| K^S - K^T \|_F^2, \qquad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x_i \cdot x_j)^p

    of features of unit length. Peng et al., *Correlation Congruence for Knowledge Distillation*, ICCV 2019, who compare
    features as they are; an embedding in between, as in other codes, is no part of it.

    Args:
        student_layer: see :class:`~kdlab.losses.LayerTerm`.
        teacher_layer: see :class:`~kdlab.losses.LayerTerm`.
        gamma: width of the kernel, above 0.
        order: P, from 1 on.
        weight: see :class:`~kdlab.losses.Term`.

    Raises:
        UserError: if ``gamma`` or ``order`` is not.
    """

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        gamma: float = 0.4,
        order: int = 2,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        positive("gamma", gamma)
        whole_number("order", order, most=64)
        self.gamma, self.order = gamma, order

    @override
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return correlation_congruence(student, teacher, self.gamma, self.order)
