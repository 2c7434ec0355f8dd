"""Base of the terms on relations between the rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    SequenceBatch,
)
from kdlab.losses.feature.layer_term import LayerTerm


def rows_of(feature: Tensor, batch: Batch) -> Tensor:
    """Return a layer's output as one row for each of the batch's (rows, ...).

    Of sequences, the rows are those that ``batch.loss_mask`` picks.

    Raises:
        UserError: if it has other rows.
    """
    if isinstance(batch, SequenceBatch) and feature.ndim >= 3 and feature.shape[:2] == batch.loss_mask.shape:
        return feature[batch.loss_mask]
    if feature.ndim >= 2 and len(feature) == len(batch):
        return feature
    raise UserError(
        "student_layer, teacher_layer",
        f"an output of shape {tuple(feature.shape)}",
        f"one feature for each of the {len(batch)} rows, or for each position",
    )


class Relation(LayerTerm):
    """Base of the terms on the relations of rows to each other, a scalar; summed over the pairs of layers."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance, a scalar, of the features (rows, ...) of one pair of layers."""
        raise TypeError(f"{type(self).__name__} does not say what it measures: define distance")

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        counted = None if batch.weight is None else batch.weight > 0
        values = []
        for pair in self.captured(student, teacher):
            s, t = (rows_of(feature, batch) for feature in pair)
            if counted is not None:
                s, t = s[counted], t[counted]
            values.append(self.distance(s, t))
        return torch.stack(values).sum()
