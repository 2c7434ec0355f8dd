"""AB: the signs of responses before their activation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from kdlab.functional import Schedule, boundary_distance
from kdlab.losses.feature.layer_term import Layers
from kdlab.losses.feature.ofd import ConnectedTerm
from kdlab.ranges import positive


class ActivationBoundary(ConnectedTerm):
    """Activation boundaries: the student's responses on the teacher's side of zero, by a margin, whatever their size.

    The distance of :func:`~kdlab.functional.boundary_distance` between the teacher's responses before their ReLU and
    the student's through a trained connector, summed over neurons; each pair counts half of the one after it. Heo et
    al., *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*, AAAI 2019. The paper
    transfers first and trains on labels after; the term may be used so, or beside the labels.

    Args:
        student_layer: module paths of responses before a ReLU, such as ``layer2.0.preact``, in the network's order.
        teacher_layer: module paths in the teacher, as many.
        margin: margin, above 0.
        weight: see :class:`~kdlab.losses.Term`.
    """

    who = "activation boundaries"

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        margin: float = 1.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        positive("margin", margin)
        self.margin = margin

    @override
    def distance(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        return boundary_distance(student, teacher, self.margin)
