"""Similarities of examples (similarity-preserving distillation)."""

from __future__ import annotations

from torch import Tensor

from kdlab.functional.relation.relation import between_rows, unit


@between_rows(2)
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute the distance of the student's similarities of examples from the teacher's.

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
