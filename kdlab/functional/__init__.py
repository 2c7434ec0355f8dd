"""Pure tensor maths, schedules, layer taps, and the types that flow between the parts.

Distances are computed in at least float32, whatever autocast hands over, one value per row where rows do not interact.
Nothing here knows a temperature: divide the logits first.
"""

from kdlab.functional.attack import pgd
from kdlab.functional.chunked import chunked
from kdlab.functional.feature.ab import boundary_distance
from kdlab.functional.feature.attention import attention_map
from kdlab.functional.feature.factor_transfer import factor_distance
from kdlab.functional.feature.fsp import fsp_matrix
from kdlab.functional.feature.nst import polynomial_mmd
from kdlab.functional.feature.ofa import enhanced_target
from kdlab.functional.feature.ofd import negative_mean, partial_l2
from kdlab.functional.feature.review import hierarchical_context
from kdlab.functional.feature.svd import (
    align_singular_vectors,
    radial_relation,
    right_singular_vectors,
    turned_positive,
)
from kdlab.functional.feature.vid import gaussian_nll
from kdlab.functional.logits import Logits, Projected, Sampled, Sparse, align_logits, columns, dense, finite
from kdlab.functional.modes import eval_mode, input_gradients
from kdlab.functional.relation.correlation_congruence import correlation_congruence
from kdlab.functional.relation.crd import noise_contrast
from kdlab.functional.relation.ickd import channel_correlation
from kdlab.functional.relation.pkt import probabilistic_transfer
from kdlab.functional.relation.rkd import relational_angle, relational_distance
from kdlab.functional.relation.similarity import similarity_preserving
from kdlab.functional.response.adversarial import reverse_gradient
from kdlab.functional.response.dist import inter_class_distance, intra_class_distance, pearson_distance
from kdlab.functional.response.divergence import (
    cross_entropy,
    jsd,
    kl,
    log_probabilities,
    logit_squared_error,
    masked_classes,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_error,
    standardize,
    symmetric_kl,
    total_variation,
)
from kdlab.functional.response.dkd import decoupled_kl
from kdlab.functional.response.mlld import batch_gram_distance, class_gram_distance
from kdlab.functional.response.soft_labels import (
    custom_target_weight,
    entropy,
    soft_label_weight,
    target_cross_entropy,
    virtual_teacher,
    without_target,
    zipf_kl,
)
from kdlab.functional.rng import hash_seed, seed_all, seed_torch
from kdlab.functional.schedule import Schedule, schedule
from kdlab.functional.taps import Taps
from kdlab.functional.types import NO_LABEL, SEGMENTS, Batch, Outputs, SequenceBatch, StepTotals, as_probabilities

__all__ = [
    "NO_LABEL",
    "SEGMENTS",
    "Batch",
    "Logits",
    "Outputs",
    "Projected",
    "Sampled",
    "Schedule",
    "SequenceBatch",
    "Sparse",
    "StepTotals",
    "Taps",
    "align_logits",
    "align_singular_vectors",
    "as_probabilities",
    "attention_map",
    "batch_gram_distance",
    "boundary_distance",
    "channel_correlation",
    "chunked",
    "class_gram_distance",
    "columns",
    "correlation_congruence",
    "cross_entropy",
    "custom_target_weight",
    "decoupled_kl",
    "dense",
    "enhanced_target",
    "entropy",
    "eval_mode",
    "factor_distance",
    "finite",
    "fsp_matrix",
    "gaussian_nll",
    "hash_seed",
    "hierarchical_context",
    "input_gradients",
    "inter_class_distance",
    "intra_class_distance",
    "jsd",
    "kl",
    "log_probabilities",
    "logit_squared_error",
    "masked_classes",
    "negative_mean",
    "noise_contrast",
    "partial_l2",
    "pearson_distance",
    "pgd",
    "polynomial_mmd",
    "probabilistic_transfer",
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
    "soft_label_weight",
    "squared_error",
    "standardize",
    "symmetric_kl",
    "target_cross_entropy",
    "total_variation",
    "turned_positive",
    "virtual_teacher",
    "without_target",
    "zipf_kl",
]
