"""PKT: probabilities that examples are neighbours."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from kdlab.functional import (
    probabilistic_transfer,
)
from kdlab.losses.relation.relation import Relation


class ProbabilisticTransfer(Relation):
    r"""PKT: the probabilities that examples are neighbours, by their cosines; a mean over pairs.

    .. math:: p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \qquad p_{j|i} = \frac{K(t_i, t_j)}{\sum_{k \ne i} K(t_i, t_k)}

    Passalis & Tefas, *Learning Deep Representations with Probabilistic Knowledge Transfer*, ECCV 2018; see
    :func:`~kdlab.functional.relation.pkt.probabilistic_transfer`. In the authors' code a row is a neighbour of itself,
    in the probabilities as in the mean. Of 64 rows the gradient here is 1.04 times theirs (cosine 0.993), of 128 1.02
    (0.997), of 3 about 3 times.
    """

    @override
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return probabilistic_transfer(student, teacher)
