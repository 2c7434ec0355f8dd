"""Losses over a vocabulary, without ever holding the logits of more than a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdlab.functional.logits import Projected

RowValues = Callable[[Tensor, Any, slice], Tensor]
"""Function of student logits (n, C), teacher logits of these rows in any form or None, and the rows -> (terms, n)."""


def chunked(
    values_of: RowValues,
    student: Projected | Tensor,
    teacher: Any,
    weights: Tensor,
    chunk: int = 128,
    parameters: Iterable[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    r"""Compute a weighted sum of losses that each look at one row's logits, a chunk of rows at a time.

    .. math:: \sum_k \sum_i w_{ki}\, v_k(z^S_i, z^T_i)

    Every chunk is projected, compared by ``values_of`` and differentiated in the forward pass, so that of (rows, C)
    there are only ``chunk`` rows at any time; what is kept for the backward pass has the size of ``hidden`` and
    ``weight``. That takes the weights before the losses are known, which is why they are an argument: the gradient of
    the sum is exact, whatever single number it is multiplied with later. The values come back detached.

    Hsu et al., *Liger Kernel: Efficient Triton Kernels for LLM Training*, 2024, do so for cross-entropy.

    Args:
        values_of: the losses; called with gradients enabled on a chunk's dense logits.
        student: projected, or dense (rows, C); receives the gradient (hidden, weight and bias, or logits).
        teacher: logits in any form, or None; receives none.
        weights: (terms, rows), without gradient; a row of weight 0 may have an infinite value.
        chunk: rows whose logits exist at once; 64 to 256 are about equally fast.
        parameters: further tensors that ``values_of`` reads and that receive a gradient (a learned temperature).

    Returns:
        The sum (), and the values (terms, rows), detached; both in at least float32.
    """
    source = _source(student if torch.is_grad_enabled() else student.detach())
    other = None if teacher is None else _source(teacher.detach())
    inputs = [*source.inputs, *(p for p in parameters if p.requires_grad)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def compare(at: slice) -> tuple[Tensor, Tensor]:
        logits = source.rows(at).requires_grad_(learns)
        return logits, values_of(logits, None if other is None else other.rows(at), at)

    return _Chunked.apply(compare, source, weights.detach(), chunk, learns, *inputs)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        compare: Callable[[slice], tuple[Tensor, Tensor]],
        source: _Projection | _Dense,
        weights: Tensor,
        chunk: int,
        learns: bool,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        parameters = inputs[len(source.inputs) :]
        learned: list[Tensor | None] = [None] * len(parameters)
        # weights are about 1 / rows; at a size of 1 the gradient of a chunk survives half precision
        size = weights.abs().amax() if weights.numel() else weights.new_ones(())
        size = size.clamp(min=torch.finfo(weights.dtype).tiny)
        weights = weights / size
        totals, values = [], []
        # projections are cast once, and divergences take at least float32: nothing is left for autocast to do
        with torch.autocast(weights.device.type, enabled=False), torch.set_grad_enabled(learns):
            for start in range(0, max(weights.shape[1], 1), chunk):
                at = slice(start, start + chunk)
                logits, value = compare(at)
                part = weights[:, at].to(value.dtype)
                value_sum = (torch.where(part != 0, value, 0.0) * part).sum()
                values.append(value.detach())
                totals.append(value_sum.detach())
                if value_sum.requires_grad:
                    gradients = torch.autograd.grad(value_sum, [logits, *parameters], allow_unused=True)
                    del value_sum, value  # the graph of a chunk must go before the gradient is projected
                    with torch.no_grad():
                        if gradients[0] is not None:
                            source.take(at, gradients[0])
                        learned = [_plus(a, b) for a, b in zip(learned, gradients[1:], strict=True)]
        stacked = torch.cat(values, 1)
        ctx.mark_non_differentiable(stacked)
        if learns:
            ctx.save_for_backward(size, *source.gradients(), *learned)
        ctx.dtypes = [x.dtype for x in inputs]
        return torch.stack(totals).sum() * size, stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        size, *gradients = ctx.saved_tensors
        factor = upstream * size
        scaled = [None if g is None else (g * factor).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return (None,) * 5 + tuple(scaled)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _source(logits: Any) -> _Projection | _Dense:
    return _Projection(logits) if isinstance(logits, Projected) else _Dense(logits)


class _Dense:
    """Logits that are there already, in any form; only tensors receive a gradient."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits.detach()
        self.inputs = [logits] if isinstance(logits, Tensor) else []
        self._gradient = torch.zeros_like(logits) if self.inputs and logits.requires_grad else None

    def rows(self, at: slice) -> Any:
        return self.logits[at]

    def take(self, at: slice, gradient: Tensor) -> None:
        if self._gradient is not None:
            self._gradient[at] = gradient

    def gradients(self) -> list[Tensor | None]:
        return [self._gradient]


class _Projection:
    """Projection of some rows to logits, which turns their gradient into that of hidden states and output layer."""

    def __init__(self, given: Projected) -> None:
        self.inputs = [x for x in (given.hidden, given.weight, given.bias) if x is not None]
        dtype = _compute_dtype(given.hidden)
        self._hidden, self._weight, *bias = (x.detach().to(dtype) for x in self.inputs)
        self._bias = bias[0] if bias else None
        wide = torch.promote_types(dtype, torch.float32)  # sums over chunks drown in half precision
        self._gradients = [torch.zeros_like(x, dtype=wide) if x.requires_grad else None for x in self.inputs]

    def rows(self, at: slice) -> Tensor:
        with torch.no_grad():
            return F.linear(self._hidden[at], self._weight, self._bias)

    def take(self, at: slice, gradient: Tensor) -> None:
        hidden, weight, *bias = self._gradients
        if hidden is not None:
            hidden[at] = gradient @ self._weight
        if weight is not None and weight.dtype == gradient.dtype:
            weight.addmm_(gradient.t(), self._hidden[at])
        elif weight is not None:
            weight.add_(gradient.t() @ self._hidden[at])
        if bias and bias[0] is not None:
            bias[0].add_(gradient.sum(0))

    def gradients(self) -> list[Tensor | None]:
        return self._gradients


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast, if on, would multiply ``x`` in; it leaves float64 alone."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
