"""Relations between the principal directions of consecutive layers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Schedule,
    align_singular_vectors,
    radial_relation,
    right_singular_vectors,
    turned_positive,
)
from kdlab.losses.feature.layer_term import Layers, LayerTerm, maps_only, project, projector
from kdlab.ranges import whole_number

SPARE = 3
"""Number of additional vectors of the student, beyond the teacher's number, that may be chosen from."""


class KDSVD(LayerTerm):
    r"""KD-SVD: the relation of the principal directions of one layer's features to those of the next.

    .. math::
        \sum_{l} \sum_{ijk} \Big(e^{-(a^S_{lik} - a^S_{l+1,jk})^2 / 8} - e^{-(a^T_{lik} - a^T_{l+1,jk})^2 / 8}\Big)^2,
        \qquad a_{lk} = \tfrac{\sigma^T_{lk}}{\|\sigma^T_l\|}\, v_{lk}

    with :math:`v_{lk}` the k-th of the first right singular vectors of layer l's feature, as a matrix of positions by
    channels, and :math:`\sigma^T_{lk}` the teacher's singular values. Of the student's ``components + 3`` first
    vectors, the one nearest to each of the teacher's is taken, and turned to its side. The teacher's are turned so that
    their greatest component is positive: the relation of two layers changes when one of them is turned, so that the
    authors' code, which takes the signs as they come, depends on the decomposition's library and precision.

    Where the widths differ, a 1x1 convolution, which trains and is no part of the student, brings the student's maps to
    the teacher's width (the paper's networks are as wide). Gradients stay finite where singular values meet or vanish,
    see :func:`~kdlab.functional.right_singular_vectors`; the authors' code leaves out those that are not, and
    bounds the term's gradient by the labels', parameter by parameter, for which there is a weight here.

    Lee, Kim & Song, *Self-supervised Knowledge Distillation using Singular Value Decomposition*, ECCV 2018.

    Args:
        student_layer: two module paths or more, from the shallowest to the deepest, of feature maps.
        teacher_layer: module paths in the teacher, as many.
        components: singular vectors of each layer, k in the paper.
        weight: see :class:`~kdlab.losses.Term`.
    """

    def __init__(
        self,
        student_layer: Layers,
        teacher_layer: Layers,
        components: int = 1,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        if len(self.student_layers) < 2:
            raise UserError("student_layer", "one layer", "two or more, whose relation is compared")
        whole_number("components", components)
        self.components = components
        self.projectors = nn.ModuleList()

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        maps_only(self.captured(student, teacher), "KD-SVD")
        if not self.projectors:
            for s, t in self.pairs(student, teacher):
                self.projectors.append(nn.Identity() if s.shape[1] == t.shape[1] else projector(s, t))

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not self.projectors:
            raise UserError("KDSVD", "call prepare(student, teacher) once before training, to make its projectors")
        each = zip(self.projectors, self.pairs(student, teacher), strict=True)
        mapped = [(s if isinstance(p, nn.Identity) else project(s, with_=p), t) for p, (s, t) in each]
        with torch.autocast(mapped[0][0].device.type, enabled=False):
            vectors = [_directions(s, t, self.components) for s, t in mapped]
            gaps = []
            for (s, t), (next_s, next_t) in pairwise(vectors):
                k = min(s.shape[2], next_s.shape[2])
                relation = radial_relation(s[..., :k], next_s[..., :k])
                gap = relation - radial_relation(t[..., :k], next_t[..., :k])
                gaps.append(gap.square().flatten(1).sum(1))
            return torch.stack(gaps).sum(0)


def _directions(student: Tensor, teacher: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Compute both networks' weighted singular vectors (B, C, k); all nan in a row with a number that is not finite."""
    (student_matrix, well), (teacher_matrix, sound) = _matrix(student), _matrix(teacher.detach())
    most = min(teacher_matrix.shape[1:])
    count = min(components, most)
    v_t, s_t = right_singular_vectors(teacher_matrix, count)
    v_t = turned_positive(v_t)
    v_s, _ = right_singular_vectors(student_matrix, min(components + SPARE, most))
    share = nn.functional.normalize(s_t, dim=1).unsqueeze(1)
    # the decomposition of what is not finite fails; whoever trains wants to hear which term it was
    fit = torch.where((well & sound)[:, None, None], 1.0, float("nan")).to(v_s.dtype)
    return align_singular_vectors(v_s, v_t) * share * fit, v_t * share


def _matrix(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape (B, C, H, W) to (B, H·W, C) in at least float32, and find the finite rows; others become 0."""
    x = feature.to(torch.promote_types(feature.dtype, torch.float32)).flatten(2).mT
    finite = x.isfinite().flatten(1).all(1)
    return torch.where(finite[:, None, None], x, 0.0), finite
