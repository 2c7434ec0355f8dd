"""Gradient norm of each term of the objective, and cosines between the gradients of two terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override


class Gradients(pl.Callback):
    r"""Callback that logs curves of the weighted terms' gradients, every so many optimizer steps.

    With :math:`g_k` the gradient of the k-th term of the objective, times its weight and as a mean over the whole step,
    with respect to everything of the student that trains:

    .. math:: \text{grad/norm/}k = \|g_k\| \qquad \text{grad/cosine/}k\_l = \frac{g_k \cdot g_l}{\|g_k\|\,\|g_l\|}

    and ``grad/norm/loss`` the norm of their sum, before clipping. A term whose norm is a thousandth of another's does
    nothing at its weight, and a cosine below 0 says that two terms pull against each other. A term of weight 0 has norm
    0; a cosine that is not defined is left out. What is not finite is left out too.

    Nothing about training changes: the graph of the step is walked once more for each term, before the step's own
    backward pass, and nothing is forwarded again, so that neither dropout nor BatchNorm notice. A measured step takes
    about as many backward passes more as there are terms, and holds as many further gradients.

    Args:
        every: number of optimizer steps from one measured step to the next; the first step is always one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._due = False
        self._sums: dict[str, list[Tensor | None]] = {}

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._due = trainer.global_step % self.every == 0
            self._sums = {}
        pl_module.objective.per_term = {} if self._due else None

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        shares, pl_module.objective.per_term = pl_module.objective.per_term, None
        if not shares:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # float16 gradients vanish without it
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        trained = [p for p in pl_module.student.parameters() if p.requires_grad]
        for name, share in shares.items():
            gradient = _gradient(share * scale, trained)
            gradient = [None if g is None else g / (scale * trainer.accumulate_grad_batches) for g in gradient]
            before = self._sums.get(name)
            self._sums[name] = (
                gradient if before is None else [_plus(a, b) for a, b in zip(before, gradient, strict=True)]
            )

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._due or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        curves = {f"grad/{name}": value for name, value in compare(self._sums, pl_module.objective.names).items()}
        self._due, self._sums = False, {}
        for logger in trainer.loggers:
            logger.log_metrics({**curves, "epoch": trainer.current_epoch}, trainer.global_step)


def compare(gradients: Mapping[str, Sequence[Tensor | None]], names: Sequence[str]) -> dict[str, float]:
    """Return ``norm/NAME`` of every term and of the sum of all (``norm/loss``), and ``cosine/A_B`` of every pair.

    Args:
        gradients: map of name → gradient with respect to each parameter, None for 0.
        names: names of all terms, in order; those without gradients have norm 0.

    Returns:
        The finite ones; a cosine with a gradient of 0 is none.
    """
    known = [name for name in names if name in gradients]
    dots = {(a, b): _dot(gradients[a], gradients[b]) for i, a in enumerate(known) for b in known[i:]}
    norms = {name: math.sqrt(dots[name, name]) if name in gradients else 0.0 for name in names}
    square = sum(dot if a == b else 2 * dot for (a, b), dot in dots.items())
    curves = {f"norm/{name}": norm for name, norm in norms.items()}
    curves["norm/loss"] = math.sqrt(max(square, 0.0))  # two that cancel may round to below 0
    for a, b in combinations(known, 2):
        if norms[a] and norms[b]:
            curves[f"cosine/{a}_{b}"] = dots[a, b] / norms[a] / norms[b]
    return {name: value for name, value in curves.items() if math.isfinite(value)}


def _gradient(share: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    if not share.requires_grad or not parameters:
        return [None] * len(parameters)
    return list(torch.autograd.grad(share, parameters, retain_graph=True, allow_unused=True))


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Return the dot product of two gradients, in float64 where the device has it: float32 would lose digits."""
    total: Tensor | float = 0.0
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            sums = wide if x.device.type == "mps" else torch.float64
            total = total + (x.to(wide) * y.to(wide)).sum(dtype=sums)
    return float(total)
