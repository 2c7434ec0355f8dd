"""Adversarial inputs by projected gradient descent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pgd(
    harm: Callable[[Tensor], Tensor],
    clean: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
) -> Tensor:
    r"""Search inputs in [0, 1], within ``eps`` of the clean ones, that do more harm, by projected gradient ascent.

    .. math:: x_{k+1} = \Pi_{\|x - x_0\|_\infty \le \epsilon,\; x \in [0, 1]}
        \big(x_k + \eta\,\mathrm{sign}\,\nabla_x h(x_k)\big)

    Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018.

    Args:
        harm: inputs → one value per row, to be raised.
        clean: (B, ...) float in [0, 1].
        eps: radius of the ball, in the maximum norm.
        steps: number of ascent steps.
        step_size: :math:`\eta`.
        start: (B, ...) offsets to begin at, in units of ``eps``, each in [-1, 1]; None begins at the clean inputs.

    Returns:
        (B, ...) new inputs, detached.
    """
    clean = clean.detach()
    low, high = (clean - eps).clamp(min=0.0), (clean + eps).clamp(max=1.0)
    x = clean if start is None else (clean + eps * start).clamp(low, high)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(harm(x).sum(), x)
        x = (x.detach() + step_size * gradient.sign()).clamp(low, high)
    return x.detach()
