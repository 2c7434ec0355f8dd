"""Terms on how examples, or channels, relate to each other inside teacher and student.

Where rows interact, a term knows the rows of its micro-batch alone: a step split into k parts sees 1/k of the pairs
(and 1/k² of the triples) of the whole, so that gradient accumulation and several processes change these terms by
nature, unlike those that look at one row. Rows of weight 0 take no part; rows without a label do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    channel_correlation,
    correlation_congruence,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from kdlab.losses.features import Layers, LayerTerm, maps_only, project, projector


def rows_of(feature: Tensor, batch: Batch) -> Tensor:
    """A layer's output as one row (rows, ...) for each of the batch's; of sequences, those that ``batch.where`` picks.

    Raises:
        UserError: if it has other rows.
    """
    if batch.where is not None and feature.ndim >= 3 and feature.shape[:2] == batch.where.shape:
        return feature[batch.where]
    if feature.ndim >= 2 and len(feature) == len(batch):
        return feature
    raise UserError(
        f"student_layer, teacher_layer: an output of shape {tuple(feature.shape)}; accepted: one feature for each of "
        f"the {len(batch)} rows, or for each position"
    )


class Relation(LayerTerm):
    """A term on the relations of rows to each other, a scalar; summed over the pairs of layers."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the features (rows, ...) of one pair of layers, a scalar."""
        raise TypeError(f"{type(self).__name__} does not say what it measures: define distance")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        counted = None if batch.weight is None else batch.weight > 0
        values = []
        for pair in self.captured(student, teacher):
            s, t = (rows_of(feature, batch) for feature in pair)
            if counted is not None:
                s, t = s[counted], t[counted]
            values.append(self.distance(s, t))
        return torch.stack(values).sum()


class SimilarityPreserving(Relation):
    r"""SP: the similarities of a batch's examples, one row of unit length for each.

    .. math:: \tfrac{1}{B^2} \| G^S - G^T \|_F^2, \qquad G_{i:} = Q Q^\top_{i:} / \| Q Q^\top_{i:} \|_2

    summed over the pairs of layers. Tung & Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019; see
    :func:`~kdlab.functional.relations.similarity_preserving`.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving(student, teacher)


class RKDDistance(Relation):
    r"""RKD-D: the distances between examples, in units of their mean, by the Huber loss; a mean over pairs.

    .. math:: \ell_1\big(\psi^S_{ij} - \psi^T_{ij}\big), \qquad \psi_{ij} = \| x_i - x_j \|_2 / \mu

    Park et al., *Relational Knowledge Distillation*, CVPR 2019; see
    :func:`~kdlab.functional.relations.relational_distance`.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_distance(student, teacher)


class RKDAngle(Relation):
    r"""RKD-A: the cosines of the angles that three examples make, by the Huber loss; a mean over triples.

    .. math:: \ell_1\big(\cos\angle^S_{ijk} - \cos\angle^T_{ijk}\big)

    Park et al., *Relational Knowledge Distillation*, CVPR 2019; see
    :func:`~kdlab.functional.relations.relational_angle`.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_angle(student, teacher)


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
        gamma: of the kernel, above 0.
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
        if not 0 < gamma < math.inf:
            raise UserError(f"gamma: {gamma}; accepted: a number above 0")
        if not (isinstance(order, int) and 1 <= order <= 64):
            raise UserError(f"order: {order}; accepted: a whole number from 1 to 64")
        self.gamma, self.order = gamma, order

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return correlation_congruence(student, teacher, self.gamma, self.order)


class ProbabilisticTransfer(Relation):
    r"""PKT: the probabilities that examples are neighbours, by their cosines; a mean over pairs.

    .. math:: p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \qquad p_{j|i} = \frac{K(t_i, t_j)}{\sum_{k \ne i} K(t_i, t_k)}

    Passalis & Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, ECCV 2018; see
    :func:`~kdlab.functional.relations.probabilistic_transfer`. In the authors' code a row is a neighbour of itself, in
    the probabilities as in the mean. Of 64 rows the gradient here is 1.04 times theirs (cosine 0.993), of 128 1.02
    (0.997), of 3 about 3 times.
    """

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return probabilistic_transfer(student, teacher)


class ChannelCorrelation(LayerTerm):
    r"""ICKD: the correlations of an example's channels, (B, C, H, W) features; one value per row.

    .. math:: \tfrac1C \| G^S - G^T \|_F^2, \qquad G_{c:} = F F^\top_{c:} / \| F F^\top_{c:} \|_2

    summed over the pairs. The student's channels become as many as the teacher's by a 1×1 convolution, which trains and
    is no part of the student. Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
    Distillation*, ICCV 2021, whose code has a BatchNorm after it; see
    :func:`~kdlab.functional.relations.channel_correlation`.
    """

    def __init__(self, student_layer: Layers, teacher_layer: Layers, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.projectors = nn.ModuleList()

    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        pairs = self.captured(student, teacher)
        maps_only(pairs, "inter-channel correlation")
        if not self.projectors:
            self.projectors.extend(projector(s, t) for s, t in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        pairs = self.captured(student, teacher)
        if not self.projectors:
            raise UserError(
                "ChannelCorrelation: call prepare(student, teacher) once before training, to make its projector"
            )
        each = zip(self.projectors, pairs, strict=True)
        return torch.stack([channel_correlation(project(s, with_=p), t) for p, (s, t) in each]).sum(0)
