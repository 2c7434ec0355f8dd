"""Distances between how two networks relate examples, or channels, to each other.

Rows interact here, so that most of these are one number per batch: a mean over pairs or triples, which keeps its size
as batches grow. A batch has no relations if it has a single row (triples need three): then the distance is 0. The two
networks may differ in width. Everything is computed in at least float32, with autocast off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

AT_ONCE = 2**23
"""Numbers that the angles of some vertices may take at once; where all take more, backward computes them again."""

Distance = Callable[..., Tensor]


def _in_full(distance: Distance) -> Distance:
    """Give a distance both features in at least float32; autocast would multiply them in half precision."""

    @wraps(distance)
    def full(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Tensor:
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"student and teacher differ in rows: {student.shape[0]} and {teacher.shape[0]}")
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            return distance(student.to(wide), teacher.to(wide), *args, **options)

    return full


def _relations(least: int) -> Callable[[Distance], Distance]:
    """Features (B, ...) as rows (B, d); fewer than ``least`` rows have no relation, and are 0 with a graph."""

    def wrap(distance: Distance) -> Distance:
        @wraps(distance)
        def of_rows(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Tensor:
            if len(student) < least:
                return student[:0].sum()
            return distance(student.flatten(1), teacher.flatten(1), *args, **options)

        return _in_full(of_rows)

    return wrap


def unit(x: Tensor) -> Tensor:
    """Rows of unit length over the last dimension; a row of zeros stays zero, and gets no gradient.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    # a division by a small epsilon instead would hand a row of zeros (a dead layer's) a gradient of 1/epsilon; and the
    # length is taken of what the greatest entry leaves between -1 and 1, whose squares neither vanish nor overflow
    greatest = x.detach().abs().amax(-1, keepdim=True)
    zero = greatest == 0
    x = torch.where(zero, 0.0, x / greatest.masked_fill(zero, 1.0))
    square = x.square().sum(-1, keepdim=True)
    return x / square.masked_fill(zero, 1.0).sqrt()


def _off_diagonal(n: int, like: Tensor) -> Tensor:
    return ~torch.eye(n, dtype=torch.bool, device=like.device)


@_relations(2)
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far the student's similarities of examples are from the teacher's.

    .. math:: \tfrac{1}{B^2} \| G^S - G^T \|_F^2, \qquad G_{i:} = Q Q^\top_{i:} / \| Q Q^\top_{i:} \|_2

    Q (B, d) holds the flattened features. Tung & Mori, *Similarity-Preserving Knowledge Distillation*, ICCV 2019.

    Args:
        student: (B, ...).
        teacher: (B, ...), of any width.

    Returns:
        A scalar.
    """
    s, t = (unit(q @ q.T) for q in (student, teacher))
    return (s - t).square().mean()


@_relations(2)
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far the student's distances of examples are from the teacher's, each in units of their mean.

    .. math::
        \frac{1}{B (B - 1)} \sum_{i \ne j} \ell_1\big(\psi^S_{ij} - \psi^T_{ij}\big), \qquad
        \psi_{ij} = \frac1\mu \| x_i - x_j \|_2, \quad \mu = \frac{1}{B (B - 1)} \sum_{i \ne j} \| x_i - x_j \|_2

    with the Huber loss :math:`\ell_1` (quadratic up to 1). Park et al., *Relational Knowledge Distillation*, CVPR 2019,
    whose sum over pairs is their mean here (their code's mean also counts each row's distance to itself, 0). Shapes as
    in :func:`similarity_preserving`.
    """
    pairs = _off_diagonal(len(student), student)
    s, t = (_scaled_distances(x)[pairs] for x in (student, teacher))
    return F.smooth_l1_loss(s, t)


def _scaled_distances(x: Tensor) -> Tensor:
    """(B, B) distances over their mean."""
    # the form with a matrix product would lose small distances; of two equal rows, cdist's gradient is 0
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(x)
    mean = distance.sum() / (n * (n - 1))
    return distance / torch.where(mean > 0, mean, 1.0)  # all rows equal: all distances are 0


@_relations(3)
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far the student's angles between three examples are from the teacher's.

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
    """The summed Huber loss of all angles at some of the rows."""

    def cosines(x: Tensor) -> Tensor:
        arms = unit(x[None] - x[vertices, None])  # zero from a vertex to itself, so that it adds nothing
        return arms @ arms.mT

    gap = F.smooth_l1_loss(cosines(student), cosines(teacher), reduction="none")
    return torch.where(_off_diagonal(len(student), gap), gap, 0.0).sum()  # no angle from an arm to itself


@_relations(2)
def correlation_congruence(student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""How far the student's correlations of examples, by a Gaussian kernel, are from the teacher's.

    .. math::
        \tfrac{1}{B^2} \| K^S - K^T \|_F^2, \qquad
        K_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x_i \cdot x_j)^p

    of features of unit length: Taylor's expansion of :math:`e^{-\gamma \|x_i - x_j\|^2}`. Peng et al., *Correlation
    Congruence for Knowledge Distillation*, ICCV 2019.

    Args:
        student: (B, ...).
        teacher: (B, ...), of any width.
        gamma: width of the kernel.
        order: P, at which the expansion ends.

    Returns:
        A scalar.
    """

    def kernel(x: Tensor) -> Tensor:
        x = unit(x)
        cosine = x @ x.T
        total = torch.zeros_like(cosine)
        for p in range(order, -1, -1):  # Horner: from the highest power down
            total = total * cosine + math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
        return total

    return (kernel(student) - kernel(teacher)).square().mean()


@_relations(2)
def probabilistic_transfer(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    r"""KL of the student's probabilities that examples are neighbours from the teacher's.

    .. math::
        \frac{1}{B (B - 1)} \sum_i \sum_{j \ne i} p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \qquad
        p_{j|i} = \frac{K(t_i, t_j)}{\sum_{k \ne i} K(t_i, t_k)}, \quad
        K(a, b) = \tfrac12 \Big( \frac{a \cdot b}{\|a\| \|b\|} + 1 \Big)

    and q the same of the student. Passalis & Tefas, *Learning Deep Representations with Probabilistic Knowledge
    Transfer*, ECCV 2018, whose sum over pairs is their mean here (their code's mean counts a row as its own neighbour).

    Args:
        student: (B, ...).
        teacher: (B, ...), of any width.
        eps: the least similarity, of rows that point opposite ways.

    Returns:
        A scalar.
    """
    n = len(student)

    def log_neighbours(x: Tensor) -> Tensor:
        x = unit(x)
        kernel = ((x @ x.T)[_off_diagonal(n, x)].view(n, n - 1) + 1) / 2
        log_kernel = kernel.clamp(min=eps).log()
        return log_kernel - log_kernel.logsumexp(1, keepdim=True)

    q, p = log_neighbours(student), log_neighbours(teacher)
    return (p.exp() * (p - q)).mean()


@_in_full
def channel_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    r"""How far the student's correlations of channels are from the teacher's, row by row: (B, C, H, W) → (B,).

    .. math:: \tfrac1C \| G^S - G^T \|_F^2, \qquad G_{c:} = F F^\top_{c:} / \| F F^\top_{c:} \|_2

    with F (C, HW) the channels of one example. Liu et al., *Exploring Inter-Channel Correlation for Diversity-preserved
    Knowledge Distillation*, ICCV 2021 (ICKD-C). Rows of unit length, and C where the paper divides by C², are those of
    the authors' code.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H', W'): as many channels, any grid.

    Raises:
        ValueError: if the channels differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"student and teacher differ in channels: {student.shape[1]} and {teacher.shape[1]}")

    def correlations(feature: Tensor) -> Tensor:
        channels = feature.flatten(2)
        return unit(channels @ channels.mT)

    return (correlations(student) - correlations(teacher)).square().sum(2).mean(1)


def noise_contrast(positive: Tensor, negatives: Tensor, log_noise: Tensor) -> Tensor:
    r"""Noise-contrastive loss of one true pair against many others: (B,), (B, N) → (B,).

    .. math::
        -\log h(u_i) - \sum_{j=1}^{N} \log\big(1 - h(v_{ij})\big), \qquad h(u) = \frac{e^u}{e^u + e^c}

    with scores u and v, and c the logarithm of how often noise gives such a pair (:math:`\log N Z / M` for N draws out
    of M examples and a normaliser Z). Gutmann & Hyvärinen, *Noise-Contrastive Estimation*, AISTATS 2010.

    Args:
        positive: scores of the true pairs.
        negatives: scores of the drawn ones; ``-inf`` leaves one out.
        log_noise: c, a scalar.
    """
    return F.softplus(log_noise - positive) + F.softplus(negatives - log_noise).sum(1)
