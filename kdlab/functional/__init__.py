"""Floor 0: pure tensor maths, schedules, layer taps, and the types that flow between the parts."""

from kdlab.functional.divergence import (
    attention_map,
    cross_entropy,
    decoupled_kl,
    kl,
    log_probabilities,
    squared_error,
    standardize,
)
from kdlab.functional.gradients import reverse_gradient
from kdlab.functional.schedule import Schedule, schedule
from kdlab.functional.seeds import mix, seed_all, seed_torch
from kdlab.functional.taps import Taps
from kdlab.functional.types import NO_LABEL, Batch, Outputs, Window, soft

__all__ = [
    "NO_LABEL",
    "Batch",
    "Outputs",
    "Schedule",
    "Taps",
    "Window",
    "attention_map",
    "cross_entropy",
    "decoupled_kl",
    "kl",
    "log_probabilities",
    "mix",
    "reverse_gradient",
    "schedule",
    "seed_all",
    "seed_torch",
    "soft",
    "squared_error",
    "standardize",
]
