"""Random numbers that are a function of where they are used, not of what was drawn before.

A counter-based generator: the number for (seed, example, view, draw) is a hash of these four integers. So the
crop of an image is the same in whatever batch, order, process or on whatever device it is made, in a resumed run,
and for teacher and student. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014), in int64 arithmetic, which wraps around alike on CPU and
GPU.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits as ``value``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix(value: int) -> int:
    """Scramble one 64-bit integer: the same function as :func:`mix_tensor`, on a Python integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def mix_tensor(x: Tensor) -> Tensor:
    """Scramble every int64 of ``x`` (any shape); the result is a new tensor."""
    # >> is arithmetic on int64, so the sign bits that it drags in are masked off
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def seed_of(*parts: int | str) -> int:
    """Combine several integers or names into one 64-bit seed; their order matters.

    >>> seed_of(0, "order", 3) == seed_of(0, "order", 3), seed_of(0, "order", 3) == seed_of(0, "order", 4)
    (True, False)
    """
    state = 0
    for part in parts:
        number = int.from_bytes(part.encode(), "little") if isinstance(part, str) else int(part)
        while True:  # names longer than eight bytes go in eight bytes at a time
            state = mix(state * _GOLDEN + (number & _MASK) + _GOLDEN)
            number >>= 64
            if number in (0, -1):
                break
    return state


def hash_seed(*parts: int) -> int:
    """Return a 63-bit hash of whole numbers, for the generators of libraries."""
    state = _GOLDEN
    for part in parts:
        state = mix((state ^ (part & _MASK)) + _GOLDEN)
    return state >> 1


def seed_torch(*parts: int) -> None:
    """Seed torch's generators (dropout and the like) from ``parts``; a few microseconds on CPU.

    A resumed run, and a run with other workers, must draw what the uninterrupted one drew; so generators are seeded
    anew at every step, from (seed, step), instead of being carried along.
    """
    torch.manual_seed(hash_seed(*parts))


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, before a network draws its first weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fold(state: Tensor | int, value: Tensor | int) -> Tensor:
    """Return the state that follows from ``state`` and ``value``, int64 tensors that broadcast; one may be a number."""
    if isinstance(state, int):
        state = _signed(state)
    if isinstance(value, int):
        value = _signed(value * _GOLDEN)
    else:
        value = value * _signed(_GOLDEN)
    return mix_tensor(torch.as_tensor(state + value + _signed(_GOLDEN)))


class Draws:
    """Random numbers of a batch of (example, view) pairs: any number of independent draws for each row.

    A draw is asked for by its number, never "the next one", so that one transform cannot shift another's numbers.

    Args:
        state: (B,) int64, one state a row; :meth:`of` makes them.
    """

    def __init__(self, state: Tensor) -> None:
        self.state = state

    @classmethod
    def of(cls, seed: int, example: Tensor, view: Tensor | int) -> Draws:
        """Return the draws for rows ``example`` (B,) int64 under ``view`` ((B,) int64 or one number)."""
        return cls(fold(fold(seed_of(seed, "augment"), example), view))

    def stream(self, number: int) -> Draws:
        """Return an independent family of draws for the same rows (one for each transform of a pipeline)."""
        return Draws(fold(self.state, number))

    def rows(self, index: Tensor | slice) -> Draws:
        """Return the draws of some of the rows."""
        return Draws(self.state[index])

    def uniform(self, draw: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw (B,) float32, uniform in [low, high): 24 random bits, which float32 holds exactly."""
        unit = (self._bits(draw) >> 8).float() * 2.0**-24
        return unit if (low, high) == (0.0, 1.0) else unit * (high - low) + low

    def integers(self, draw: int, n: int) -> Tensor:
        """Draw (B,) int64, uniform in 0 .. n-1 (n below 2^31)."""
        return (self._bits(draw) * n) >> 32

    def _bits(self, draw: int) -> Tensor:
        """Draw (B,) int64 in 0 .. 2^32 - 1."""
        return (fold(self.state, draw) >> 32) & 0xFFFFFFFF


def uniform(seed: int, example: Tensor, view: Tensor | int, draw: int = 0) -> Tensor:
    """Return the numbers (B,) float32 in [0, 1) that are a function of (seed, example, view, draw).

    Args:
        seed: any integer.
        example: (B,) int64.
        view: (B,) int64, or one number for all rows.
        draw: index among the row's numbers.
    """
    return Draws.of(seed, example, view).uniform(draw)


def permutation(n: int, *key: int | str) -> Tensor:
    """Permute the numbers 0 .. n-1 as a function of ``key``: (n,) int64 on the CPU.

    Sorting by hash, unlike ``torch.randperm``, does not depend on the library's generator. The hash is one to one, so
    there are no ties. In NumPy, whose calls cost a third of torch's at a thousand rows.
    """
    x = np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(seed_of(*key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return torch.from_numpy((x ^ (x >> np.uint64(31))).argsort())
