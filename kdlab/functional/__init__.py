"""Floor 0: pure tensor maths, schedules, layer taps, and the types that flow between the parts."""

from kdlab.functional.chunked import chunked
from kdlab.functional.correlation import (
    batch_gram_distance,
    class_gram_distance,
    inter_class_distance,
    intra_class_distance,
    pearson_distance,
)
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
from kdlab.functional.made_targets import (
    custom_target_weight,
    entropy,
    soft_label_weight,
    target_cross_entropy,
    virtual_teacher,
    without_target,
    zipf_kl,
)
from kdlab.functional.maps import (
    boundary_distance,
    factor_distance,
    fsp_matrix,
    gaussian_nll,
    negative_mean,
    partial_l2,
    polynomial_mmd,
)
from kdlab.functional.probing import pgd, probing
from kdlab.functional.pyramid import hierarchical_context
from kdlab.functional.relations import (
    channel_correlation,
    correlation_congruence,
    noise_contrast,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from kdlab.functional.schedule import Schedule, schedule
from kdlab.functional.seeds import mix, seed_all, seed_torch
from kdlab.functional.singular import aligned, radial_relation, right_singular_vectors
from kdlab.functional.taps import Taps
from kdlab.functional.target import enhanced_target
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
    "aligned",
    "attention_map",
    "batch_gram_distance",
    "boundary_distance",
    "channel_correlation",
    "chunked",
    "class_gram_distance",
    "columns",
    "comparable",
    "correlation_congruence",
    "cross_entropy",
    "custom_target_weight",
    "decoupled_kl",
    "dense",
    "enhanced_target",
    "entropy",
    "factor_distance",
    "finite",
    "fsp_matrix",
    "gaussian_nll",
    "hierarchical_context",
    "inter_class_distance",
    "intra_class_distance",
    "jsd",
    "kl",
    "log_probabilities",
    "mix",
    "negative_mean",
    "noise_contrast",
    "partial_l2",
    "pearson_distance",
    "pgd",
    "polynomial_mmd",
    "probabilistic_transfer",
    "probing",
    "radial_relation",
    "relational_angle",
    "relational_distance",
    "reverse_gradient",
    "reverse_kl",
    "right_singular_vectors",
    "schedule",
    "seed_all",
    "seed_torch",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft",
    "soft_label_weight",
    "squared_error",
    "standardize",
    "symmetric_kl",
    "target_cross_entropy",
    "total_variation",
    "virtual_teacher",
    "without_target",
    "zipf_kl",
]
