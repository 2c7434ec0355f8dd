"""Similarity-preserving knowledge distillation."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    similarity_preserving,
)
from kdlab.losses.relation.relation import Relation


class SimilarityPreserving(Relation):
    r"""SP: the similarities of a batch's examples, one row of unit length for each.

    .. math:: \tfrac{1}{B^2} \| G^S - G^T \|_F^2, \qquad G_{i:} = Q Q^\top_{i:} / \| Q Q^\top_{i:} \|_2

    summed over the pairs of layers. Tung & Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019; see
    :func:`~kdlab.functional.relation.similarity.similarity_preserving`.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving(student, teacher)
