"""What distances of feature maps share: the precision that they are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(feature: Tensor) -> Tensor:
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(B, m, n) x (B, n, k), in the precision that it is given: autocast would take products back to bf16."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)
