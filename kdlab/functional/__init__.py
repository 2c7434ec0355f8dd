"""Floor 0: pure tensor maths, schedules, layer taps, and the types that flow between the parts."""

from kdlab.functional.chunked import chunked
from kdlab.functional.divergence import (
    attention_map,
    cross_entropy,
    decoupled_kl,
    jsd,
    kl,
    log_probabilities,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_error,
    standardize,
    symmetric_kl,
    total_variation,
)
from kdlab.functional.gradients import reverse_gradient
from kdlab.functional.logits import Logits, Projected, Sampled, Sparse, columns, comparable, dense, finite
from kdlab.functional.schedule import Schedule, schedule
from kdlab.functional.seeds import mix, seed_all, seed_torch
from kdlab.functional.taps import Taps
from kdlab.functional.types import NO_LABEL, SEGMENTS, Batch, Outputs, Window, soft

__all__ = [
    "NO_LABEL",
    "SEGMENTS",
    "Batch",
    "Logits",
    "Outputs",
    "Projected",
    "Sampled",
    "Schedule",
    "Sparse",
    "Taps",
    "Window",
    "attention_map",
    "chunked",
    "columns",
    "comparable",
    "cross_entropy",
    "decoupled_kl",
    "dense",
    "finite",
    "jsd",
    "kl",
    "log_probabilities",
    "mix",
    "reverse_gradient",
    "reverse_kl",
    "schedule",
    "seed_all",
    "seed_torch",
    "skew_kl",
    "skew_reverse_kl",
    "soft",
    "squared_error",
    "standardize",
    "symmetric_kl",
    "total_variation",
]
