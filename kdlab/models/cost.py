"""What a network costs: parameters, bytes, operations, latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdlab.functional import Projected
from kdlab.functional.modes import eval_mode

Example = Tensor | Mapping[str, Tensor]
"""Inputs as a network takes them: a tensor, or keyword tensors."""

WARM_UP = 5


def parameters(net: nn.Module) -> int:
    """Count the parameters of ``net``, frozen ones too; a shared one counts once."""
    return sum(p.numel() for p in net.parameters())


def size_bytes(state: nn.Module | Mapping[str, Tensor]) -> int:
    """Return the size in bytes of all tensors of a state dict (or of a network's), without a file's framing."""
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    return sum(t.numel() * t.element_size() for t in tensors.values())


def flops(net: nn.Module, example: Example) -> int:
    """Count the floating-point operations of one forward pass for one example.

    Counts matrix products, convolutions and attention, and two for each multiply-add; additions, activations
    and normalisation are left out. (Papers that count a multiply-add as one give half of this.)

    Args:
        net: the network.
        example: a batch of inputs; only its first row is used.
    """
    with torch.no_grad(), eval_mode(net), FlopCounterMode(display=False) as counter:
        _call(net, first_row(example))
    return counter.get_total_flops()


def latency_ms(net: nn.Module, example: Example, n: int = 30) -> float:
    """Measure the median time of a forward pass for one example, in milliseconds, on the CPU with one thread.

    A network on another device is measured on a copy. Modes, and the number of threads, are afterwards as
    before.

    Args:
        net: the network.
        example: a batch of inputs; only its first row is used.
        n: number of passes that are timed, after a few that are not.
    """
    row = first_row(example)
    row = row.cpu() if isinstance(row, Tensor) else {k: v.cpu() for k, v in row.items()}
    if any(p.device.type != "cpu" for p in net.parameters()):
        net = copy.deepcopy(net).cpu()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), eval_mode(net):
            for _ in range(WARM_UP):
                _call(net, row)
            return 1000 * statistics.median(_seconds(net, row) for _ in range(max(n, 1)))
    finally:
        torch.set_num_threads(threads)


def _seconds(net: nn.Module, row: Example) -> float:
    start = time.perf_counter()
    _call(net, row)
    return time.perf_counter() - start


def _call(net: nn.Module, row: Example) -> Any:
    raw = net(row) if isinstance(row, Tensor) else net(**row)
    return raw.dense() if isinstance(raw, Projected) else raw


def first_row(example: Example) -> Example:
    """Return the first row of a batch of inputs, still a batch."""
    return example[:1] if isinstance(example, Tensor) else {k: v[:1] for k, v in example.items()}
