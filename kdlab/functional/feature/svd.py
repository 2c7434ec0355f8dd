"""Singular vectors with gradients that stay finite, and what lies between those of two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BROADENING = 1e-3
"""Gap of two squared singular values, as a share of the greatest, below which their gradient is damped."""


class _RightSingular(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, broadening: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        ctx.count, ctx.broadening = count, broadening
        values = s[..., :count].clone()
        ctx.mark_non_differentiable(values)
        return vh[..., :count, :].mT.clone(), values

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        u, s, vh = ctx.saved_tensors
        k = ctx.count
        v, first = vh.mT, s[..., :k]
        squared = s.square()
        least = torch.finfo(s.dtype).tiny ** 0.5
        width = (ctx.broadening * squared[..., :1] + least).unsqueeze(-1)

        def inverse(gap: Tensor) -> Tensor:
            return gap / (gap.square() + width.square())

        # vectors turn towards each other, by the inverse of the gap of their squared values...
        inside = vh @ grad
        turn = inside * inverse(first.square().unsqueeze(-2) - squared.unsqueeze(-1))
        by_first = (u[..., :k] * first.unsqueeze(-2)) @ turn.mT @ vh
        by_other = (u * s.unsqueeze(-2)) @ turn @ vh[..., :k, :]
        # ... and out of the space that they span, whose values are 0
        away = (grad - v @ inside) * (first * inverse(first.square().unsqueeze(-2)).squeeze(-2)).unsqueeze(-2)
        return by_first + by_other + u[..., :k] @ away.mT, None, None


def right_singular_vectors(x: Tensor, count: int, broadening: float = BROADENING) -> tuple[Tensor, Tensor]:
    r"""Compute the first right singular vectors of matrices, and their singular values.

    The gradient of a singular vector holds :math:`1 / (\sigma_i^2 - \sigma_j^2)` and :math:`1 / \sigma_i`, which grow
    without bound where values meet or vanish; there the vectors themselves are arbitrary. As Liao et al.,
    *Differentiable Programming Tensor Networks*, Phys. Rev. X 2019 do, each :math:`1/d` is replaced by
    :math:`d / (d^2 + \varepsilon^2)`: the same for gaps wide beside :math:`\varepsilon`, 0 where there is no gap. The
    values carry no gradient.

    Args:
        x: (..., N, C), float32 or float64.
        count: number of vectors, at most min(N, C).
        broadening: :math:`\varepsilon`, as a share of the greatest squared value.

    Returns:
        vectors (..., C, count) of length 1, whose sign is arbitrary, and values (..., count) from greatest to least.
    """
    return _RightSingular.apply(x, count, broadening)


def turned_positive(vectors: Tensor) -> Tensor:
    """Flip the sign of vectors (..., C, k) so that each one's greatest component by magnitude is positive.

    A singular vector is as right with the other sign, and which one a decomposition gives depends on library, device
    and precision.
    """
    greatest = vectors.detach().abs().argmax(-2, keepdim=True)
    return vectors * torch.where(vectors.detach().gather(-2, greatest) < 0, -1.0, 1.0).to(vectors.dtype)


def align_singular_vectors(student: Tensor, teacher: Tensor) -> Tensor:
    """Choose for each of the teacher's vectors the student's of most similar direction, turned to the same side.

    Args:
        student: (B, C, m) of length 1.
        teacher: (B, C, k) of length 1.

    Returns:
        (B, C, k). No gradient goes through the choice.
    """
    cosine = student.detach().mT @ teacher
    best = cosine.abs().argmax(1, keepdim=True)
    sign = cosine.gather(1, best).sign()
    return student.gather(2, best.expand(-1, student.shape[1], -1)) * sign


def radial_relation(first: Tensor, second: Tensor) -> Tensor:
    r"""Compute the radial basis function of all pairs of numbers of two layers' vectors.

    .. math:: \exp\big(-(a_{ik} - b_{jk})^2 / 8\big)

    Lee, Kim & Song, *Self-supervised Knowledge Distillation using Singular Value Decomposition*, ECCV 2018.

    Args:
        first: (B, C, k).
        second: (B, D, k).

    Returns:
        (B, C, D, k).
    """
    return (-(first.unsqueeze(2) - second.unsqueeze(1)).square() / 8).exp()
