"""Eval mode for a while, for networks that are asked about inputs under change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def probing(*nets: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Every module of ``nets`` in eval mode, gradients on, autocast off; afterwards each is in the mode it was in.

    In eval mode no BatchNorm moves and nothing drops out. Take gradients by ``torch.autograd.grad`` of the inputs
    alone: ``backward`` would add to those of the parameters.
    """
    changed = [module for net in nets for module in net.modules() if module.training]
    for module in changed:  # not by eval(): a frozen part is in eval mode already, and must stay there
        module.training = False
    try:
        with torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for module in changed:
            module.training = True
