"""What distances between relations share: float32 without autocast, rows flattened, and a least number of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**23
"""Most numbers that the angles at some vertices may take at once; above, backward computes the angles again."""


Distance = Callable[..., Tensor]


def in_float32(distance: Distance) -> Distance:
    """Give a distance both features in at least float32; autocast would multiply them in half precision."""

    @wraps(distance)
    def full(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Tensor:
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(f"student and teacher differ in rows: {student.shape[0]} and {teacher.shape[0]}")
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            return distance(student.to(wide), teacher.to(wide), *args, **options)

    return full


def between_rows(least: int) -> Callable[[Distance], Distance]:
    """Decorate a distance to flatten features (B, ...) to rows; of fewer than ``least`` it returns 0, with a graph."""

    def wrap(distance: Distance) -> Distance:
        @wraps(distance)
        def of_rows(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Tensor:
            if len(student) < least:
                return student[:0].sum()
            return distance(student.flatten(1), teacher.flatten(1), *args, **options)

        return in_float32(of_rows)

    return wrap


def unit(x: Tensor) -> Tensor:
    """Scale rows to unit length over the last dimension; a row of zeros stays zero, and gets no gradient.

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


def off_diagonal(n: int, like: Tensor) -> Tensor:
    """Return an (n, n) mask of all pairs of different rows, on the device of ``like``."""
    return ~torch.eye(n, dtype=torch.bool, device=like.device)
