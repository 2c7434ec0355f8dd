"""Building a network only if it fits into memory: its size is known before its weights are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kdlab.errors import UserError
from kdlab.system import memory

LARGE = 2**26
"""Size of one weight, or of all together, from which a network is measured before it is made (256 MiB)."""

SMALL = 2**12
"""Size of a weight below which it is made to measure a network too: constructors may look into small ones."""

MOST_TENSORS = 30_000
"""Maximum number of weights and buffers of a network; above, its constructor would take minutes."""

_MADE_OF_SIZE = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full, torch.eye}


class _Large(Exception):
    """Signal that a network's size must be measured first."""


class _Watch(TorchFunctionMode):
    """Mode that sums up the tensors that are asked for, and stops where they are too many, or too large.

    Args:
        most: numbers in all; None for any, of which those of ``SMALL`` or more are made without memory.
    """

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self.most, self.numbers, self.tensors = most, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MADE_OF_SIZE:
            numbers = _numbers(args)
            self.numbers += numbers
            self.tensors += 1
            if self.tensors > MOST_TENSORS or (self.most is not None and self.numbers > self.most):
                raise _Large
            if self.most is None and numbers >= SMALL:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _numbers(args: tuple) -> int:
    """Return how many numbers a tensor of such a size holds; 0 where the size is not given by position."""
    sizes = args[0] if args and isinstance(args[0], list | tuple) else args
    whole = [size for size in sizes if isinstance(size, int)]
    return math.prod(whole) if len(whole) == len(sizes) else 0


def build_affordable(build: Callable[[], nn.Module], key: str, trains: bool = False) -> nn.Module:
    """Build a network, unless it is larger than the memory that is available.

    A small network is built once, while the sizes that its constructor asks for are added up. One that is not small
    is first built with its large weights on the meta device, which takes no memory, to be measured.

    Args:
        build: function that builds the network; called up to three times, and builds the same one each time.
        key: key of the network in the config, for messages.
        trains: require room for its gradients too.

    Raises:
        UserError: names the size, and what is available.
    """
    watch = _Watch(LARGE)
    try:
        with watch:
            return build()
    except _Large:
        if watch.tensors > MOST_TENSORS:
            raise _too_many(key) from None
    numbers, needed = _measure(build, key, watch.numbers)
    what = f"a network of {numbers:,} numbers" + ", with its gradients," * trains
    memory.refuse_larger(key, needed * (1 + trains), what)
    return build()


def _measure(build: Callable[[], nn.Module], key: str, least: int) -> tuple[int, int]:
    """Measure how many numbers a network holds, and how many bytes they take.

    Args:
        build: function that builds the network.
        key: key of the network in the config.
        least: count of numbers that it is known to ask for, where its constructor cannot do without them.
    """
    watch = _Watch(None)
    try:
        with watch:
            net = build()
    except _Large:
        raise _too_many(key) from None
    except UserError:
        raise
    except Exception:  # a constructor that computes with its weights
        numbers = max(least, watch.numbers)
        return numbers, 4 * numbers
    tensors = [*net.parameters(), *net.buffers()]
    return sum(one.numel() for one in tensors), sum(one.numel() * one.element_size() for one in tensors)


def _too_many(key: str) -> UserError:
    return UserError(key, f"more than {MOST_TENSORS:,} weights", "a network of fewer layers")
