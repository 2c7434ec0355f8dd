"""Randomness as a function of where training stands, never of what happened before.

A resumed run, and a run with other workers, must draw what the uninterrupted one drew; so generators are seeded anew
at every step from (seed, step) instead of being carried along.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_MASK = (1 << 64) - 1


def hash_seed(*parts: int) -> int:
    """A 63-bit hash of whole numbers (the finaliser of splitmix64, Steele et al., OOPSLA 2014, chained)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_torch(*parts: int) -> None:
    """Seed torch's generators (dropout and the like) from ``parts``; a few microseconds on CPU."""
    torch.manual_seed(hash_seed(*parts))


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch, before a network draws its first weights."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
