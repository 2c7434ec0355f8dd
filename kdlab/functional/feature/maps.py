"""What distances of feature maps share: the precision that they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(feature: Tensor) -> Tensor:
    """Return a feature in at least float32."""
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def batched_products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (B, m, n) by (B, n, k) in their own precision: autocast would take products back to bf16."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)
