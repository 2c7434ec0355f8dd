"""Networks in evaluation mode for a while; afterwards each of their modules is in the mode it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """Put every module of ``nets`` in evaluation mode: no BatchNorm moves, and nothing drops out."""
    changed = [module for net in nets for module in net.modules() if module.training]
    for module in changed:  # not by eval(): a frozen part is in evaluation mode already, and must stay there
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


@contextmanager
def input_gradients(*nets: nn.Module, device: torch.device | str = "cpu") -> Iterator[None]:
    """Set evaluation mode with gradients on and autocast off, for gradients with regard to inputs.

    Take them by ``torch.autograd.grad`` of the inputs alone: ``backward`` would add to those of the parameters.
    """
    with eval_mode(*nets), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
        yield
