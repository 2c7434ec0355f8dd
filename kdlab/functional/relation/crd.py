"""Noise-contrastive estimation of one true pair among many (CRD)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def noise_contrast(positive: Tensor, negatives: Tensor, log_noise: Tensor) -> Tensor:
    r"""Compute the noise-contrastive loss of one true pair against many others: (B,), (B, N) → (B,).

    .. math::
        -\log h(u_i) - \sum_{j=1}^{N} \log\big(1 - h(v_{ij})\big), \qquad h(u) = \frac{e^u}{e^u + e^c}

    with scores u and v, and c the logarithm of how often noise gives such a pair (:math:`\log N Z / M` for N draws out
    of M examples and a normaliser Z). Gutmann & Hyvärinen, *Noise-Contrastive Estimation*, AISTATS 2010.

    Args:
        positive: scores of the true pairs.
        negatives: scores of the drawn ones; ``-inf`` leaves one out.
        log_noise: c, a scalar.
    """
    return F.softplus(log_noise - positive) + F.softplus(negatives - log_noise).sum(1)
