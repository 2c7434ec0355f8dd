"""Terms against the labels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from kdlab.functional import Batch, Outputs, Schedule, cross_entropy, dense
from kdlab.losses.term import LabelTerm
from kdlab.ranges import share


class CrossEntropy(LabelTerm):
    """Cross-entropy with the labels, hard (B,) or soft (B, C); in nats per labelled row.

    Args:
        label_smoothing: share of each target spread evenly over the classes, in [0, 1).
        weight: see :class:`~kdlab.losses.Term`.
    """

    rowwise = True

    def __init__(self, label_smoothing: float = 0.0, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight)
        share("label_smoothing", label_smoothing, one=False)
        self.label_smoothing = label_smoothing

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        return cross_entropy(dense(student.logits), batch.targets, self.label_smoothing)
