"""Distances and angles between examples (relational knowledge distillation)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdlab.functional.relation.relation import AT_ONCE, between_rows, off_diagonal, unit


@between_rows(2)
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the difference of the student's distances of examples from the teacher's, in units of their means.

    .. math::
        \frac{1}{B (B - 1)} \sum_{i \ne j} \ell_1\big(\psi^S_{ij} - \psi^T_{ij}\big), \qquad
        \psi_{ij} = \frac1\mu \| x_i - x_j \|_2, \quad \mu = \frac{1}{B (B - 1)} \sum_{i \ne j} \| x_i - x_j \|_2

    with the Huber loss :math:`\ell_1` (quadratic up to 1). Park et al., *Relational Knowledge Distillation*, CVPR 2019,
    whose sum over pairs is their mean here (their code's mean also counts each row's distance to itself, 0). Shapes as
    in :func:`similarity_preserving`.
    """
    pairs = off_diagonal(len(student), student)
    s, t = (_scaled_distances(x)[pairs] for x in (student, teacher))
    return F.smooth_l1_loss(s, t)


def _scaled_distances(x: Tensor) -> Tensor:
    """Return the distances (B, B) divided by their mean."""
    # the form with a matrix product would lose small distances; of two equal rows, cdist's gradient is 0
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(x)
    mean = distance.sum() / (n * (n - 1))
    return distance / torch.where(mean > 0, mean, 1.0)  # all rows equal: all distances are 0


@between_rows(3)
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the difference of the student's angles between three examples from the teacher's.

    .. math::
        \frac{1}{B (B - 1) (B - 2)} \sum_{i \ne j \ne k} \ell_1\big(\cos\angle^S_{ijk} - \cos\angle^T_{ijk}\big), \qquad
        \cos\angle_{ijk} = \Big\langle \frac{x_i - x_j}{\|x_i - x_j\|}, \frac{x_k - x_j}{\|x_k - x_j\|} \Big\rangle

    with the Huber loss :math:`\ell_1`; an angle between equal rows has cosine 0. Park et al., *Relational Knowledge
    Distillation*, CVPR 2019, whose sum over triples is their mean here (their code's mean also counts triples that name
    a row twice). Takes B³ steps of d. Shapes as in :func:`similarity_preserving`.
    """
    n = len(student)
    at_once = max(1, AT_ONCE // (n * max(n, student.shape[1], teacher.shape[1])))
    if at_once >= n:
        total = _angles(student, teacher, slice(None))
    else:
        parts = [slice(at, at + at_once) for at in range(0, n, at_once)]
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        total = torch.stack([checkpoint(_angles, student, teacher, part, **options) for part in parts]).sum()
    return total / (n * (n - 1) * (n - 2))


def _angles(student: Tensor, teacher: Tensor, vertices: slice) -> Tensor:
    """Return the summed Huber loss of all angles at some of the rows."""

    def cosines(x: Tensor) -> Tensor:
        arms = unit(x[None] - x[vertices, None])  # zero from a vertex to itself, so that it adds nothing
        return arms @ arms.mT

    gap = F.smooth_l1_loss(cosines(student), cosines(teacher), reduction="none")
    return torch.where(off_diagonal(len(student), gap), gap, 0.0).sum()  # no angle from an arm to itself
