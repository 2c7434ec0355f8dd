"""Names of classes: comparison of two lists, and reordering of a network's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kdlab.config.override_text import argument
from kdlab.data import DataModule
from kdlab.errors import UserError
from kdlab.functional import Outputs
from kdlab.models.transforms.surgery import head_of, reorder_classes

SHOWN = 12
"""Largest number of class names that a message shows."""


def classified_alone(data: DataModule) -> bool:
    """Return whether data are rows of one task, whose classes have names."""
    return data.classified and not data.tasks


def permutation(have: Sequence[str], want: Sequence[str]) -> list[int] | None:
    """Return for each name in ``want`` its place in ``have``; None where the order is the same, or the names differ.

    >>> permutation(["neg", "pos"], ["pos", "neg"])
    [1, 0]
    """
    if list(have) == list(want) or sorted(have) != sorted(want) or len(set(have)) < len(have):
        return None
    return [list(have).index(name) for name in want]


def numbered(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether names are the numbers of unnamed classes, while the others are real names."""
    return list(names) == [str(n) for n in range(len(names))] and not any(_is_number(name) for name in others)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def same_classes(have: Sequence[str], want: Sequence[str], data: DataModule, task: str) -> str:
    """Return advice on how to give data and network the same classes, for a message."""
    whole = "the run of a network for the same classes"
    if not task and len(have) > 1 and (set(have) < set(want) or data.chosen):
        return f"{argument('data.classes', have)}, or {whole}"
    if len(have) == len(want):
        return f"{whole} (where names alone differ: its weights copied out of the folder, to be taken as they come)"
    return whole


def reordered(net: nn.Module, order: Sequence[int], data: DataModule, task: str = "") -> bool:
    """Bring a network's classes into another order, in place, and check that its outputs follow.

    Returns:
        Whether they do; where they do not, the network is as it was.
    """
    try:
        head = f"heads.{task}" if task else head_of(net)[0]
    except UserError:
        return False
    inputs = next(iter(data.ordered_loader("train", batch_size=2))).to("cpu").inputs
    training = net.training
    net.eval()
    with torch.no_grad():
        before = _answer(net, inputs, task)
        if before.shape[-1] != len(order) or not reorder_classes(net, head, order):
            net.train(training)
            return False
        after = _answer(net, inputs, task)
        done = torch.allclose(after, before[..., list(order)], rtol=1e-4, atol=1e-5)
        if not done:
            back = sorted(range(len(order)), key=lambda place: order[place])
            reorder_classes(net, head, back)
    net.train(training)
    return done


def _answer(net: nn.Module, inputs: object, task: str) -> torch.Tensor:
    outputs = Outputs.of(net(**inputs) if isinstance(inputs, Mapping) else net(inputs))
    return outputs.heads[task] if task else outputs.logits


def listed(names: Sequence[str]) -> str:
    """Return names of classes for a message, the first of many."""
    shown = ", ".join(names[:SHOWN])
    return shown + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")
