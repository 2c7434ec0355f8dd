"""Probabilities that examples are neighbours (probabilistic knowledge transfer)."""

from __future__ import annotations

from torch import Tensor

from kdlab.functional.relation.relation import between_rows, off_diagonal, unit


@between_rows(2)
def probabilistic_transfer(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    r"""Compute the KL of the student's probabilities that examples are neighbours from the teacher's.

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
        kernel = ((x @ x.T)[off_diagonal(n, x)].view(n, n - 1) + 1) / 2
        log_kernel = kernel.clamp(min=eps).log()
        return log_kernel - log_kernel.logsumexp(1, keepdim=True)

    q, p = log_neighbours(student), log_neighbours(teacher)
    return (p.exp() * (p - q)).mean()
