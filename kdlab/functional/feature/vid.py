"""Gaussian negative log-likelihood of a feature (VID)."""

from __future__ import annotations

from torch import Tensor

from kdlab.functional.feature.maps import at_least_float32


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Compute the negative log-likelihood of a target under a Gaussian with a variance by channel, less a constant.

    .. math:: \frac{1}{n} \sum_{c, p} \Big( \tfrac12 \log \sigma_c^2 + \frac{(t_{cp} - \mu_{cp})^2}{2 \sigma_c^2} \Big)

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019. The mean over the n elements
    is that of the authors' code, and of the weights in use.

    Args:
        mean: (B, C, H, W), or (B, ..., C).
        variance: (C,), above 0.
        target: tensor of the shape of ``mean``.

    Returns:
        (B,), negative where the variance is small and the mean right.
    """
    mu, t = at_least_float32(mean), at_least_float32(target)
    v = at_least_float32(variance).view(-1, 1, 1) if mu.ndim == 4 else at_least_float32(variance)
    return (0.5 * (v.log() + (t - mu).pow(2) / v)).flatten(1).mean(1)
