"""RKD: distances and angles between examples."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    relational_angle,
    relational_distance,
)
from kdlab.losses.relation.relation import Relation


class RKDDistance(Relation):
    r"""RKD-D: the distances between examples, in units of their mean, by the Huber loss; a mean over pairs.

    .. math:: \ell_1\big(\psi^S_{ij} - \psi^T_{ij}\big), \qquad \psi_{ij} = \| x_i - x_j \|_2 / \mu

    Park et al., *Relational Knowledge Distillation*, CVPR 2019; see
    :func:`~kdlab.functional.relation.rkd.relational_distance`.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_distance(student, teacher)


class RKDAngle(Relation):
    r"""RKD-A: the cosines of the angles that three examples make, by the Huber loss; a mean over triples.

    .. math:: \ell_1\big(\cos\angle^S_{ijk} - \cos\angle^T_{ijk}\big)

    Park et al., *Relational Knowledge Distillation*, CVPR 2019; see
    :func:`~kdlab.functional.relation.rkd.relational_angle`.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relational_angle(student, teacher)
