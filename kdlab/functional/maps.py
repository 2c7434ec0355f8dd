"""Distances between feature maps that are more than a squared error, one value per row.

Everything is computed in at least float32, whatever autocast handed over. Features are (B, C, H, W) where nothing else
is said; a student's carries the gradient, a teacher's need not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlab.functional.relations import unit


def _wide(feature: Tensor) -> Tensor:
    return feature.to(torch.promote_types(feature.dtype, torch.float32))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """(B, m, n) x (B, n, k), in the precision that it is given: autocast would take products back to bf16."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Flow of solution procedure: how the channels of two layers go together, over the positions of a picture.

    .. math:: G_{ij} = \frac{1}{H W} \sum_p F^1_{ip} F^2_{jp}

    Yim et al., *A Gift from Knowledge Distillation*, CVPR 2017.

    Args:
        first: (B, m, H, W) of the earlier layer.
        second: (B, n, H', W') of the later one; the finer of the two is averaged down to the grid of the coarser.

    Returns:
        (B, m, n).
    """
    a, b = _wide(first), _wide(second)
    if a.shape[2:] != b.shape[2:]:
        grid = min((a.shape[2], a.shape[3]), (b.shape[2], b.shape[3]), key=math.prod)
        a, b = F.adaptive_avg_pool2d(a, grid), F.adaptive_avg_pool2d(b, grid)
    return _products(a.flatten(2), b.flatten(2).transpose(1, 2)) / math.prod(a.shape[2:])


def polynomial_mmd(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy between the channels of two layers, with the kernel :math:`(x^\top y)^2`.

    .. math::
        \frac{1}{C_T^2} \sum_{i i'} k(t_i, t_{i'}) + \frac{1}{C_S^2} \sum_{j j'} k(s_j, s_{j'})
        - \frac{2}{C_T C_S} \sum_{i j} k(t_i, s_j)

    with each channel's map flattened and of unit length. Huang & Wang, *Like What You Like: Knowledge Distill via
    Neuron Selectivity Transfer*, 2017, whose polynomial kernel has d = 2, c = 0.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W), of the same grid.

    Returns:
        (B,), at least 0 but for rounding.
    """
    s, t = (F.normalize(_wide(x).flatten(2), dim=2) for x in (student, teacher))
    if s.shape[2] <= s.shape[1] + t.shape[1]:
        # the same by the positions: no difference of large sums, and less of them on the coarse grids of deep layers
        gram_s, gram_t = (_products(x.transpose(1, 2), x) / x.shape[1] for x in (s, t))
        return (gram_s - gram_t).pow(2).sum((1, 2))
    same_t, same_s, cross = (_products(x, y.transpose(1, 2)).pow(2).mean((1, 2)) for x, y in ((t, t), (s, s), (t, s)))
    return same_t + same_s - 2 * cross


def boundary_distance(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    r"""How far the student's responses are from the teacher's side of zero, with a margin.

    .. math::
        \big\| \rho(T) \odot \sigma(\mu - S) + (1 - \rho(T)) \odot \sigma(\mu + S) \big\|_2^2

    :math:`\rho` says whether a neuron is active (above 0), :math:`\sigma` is ReLU, :math:`\mu` the margin. Heo et al.,
    *Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons*, AAAI 2019.

    Args:
        student: responses before their activation, any shape (B, ...), as wide as the teacher's.
        teacher: of the same shape.
        margin: above 0.

    Returns:
        (B,), summed over the neurons.
    """
    s = _wide(student)
    return F.relu(margin - torch.where(teacher > 0, s, -s)).pow(2).flatten(1).sum(1)


def negative_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    r"""The mean of what is negative in N(mean, deviation²): the margin of a margin ReLU.

    .. math::
        E[x \mid x < 0] = \mu - \sigma \frac{\varphi(\mu / \sigma)}{\Phi(-\mu / \sigma)}

    Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019, by the shift and scale of the BatchNorm.

    Args:
        mean: any shape.
        deviation: of the same shape; its sign does not count.

    Returns:
        Of that shape, at most 0, in the precision of ``mean``. Computed in float64 by the logarithm of :math:`\Phi`,
        so that a channel that is hardly ever negative needs no case of its own: its margin tends to 0.
    """
    mu, sigma = mean.double(), deviation.double().abs().clamp(min=1e-12)
    z = mu / sigma
    ratio = torch.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(-z))
    # far out this is a difference of nearly equal numbers, whose expansion begins with -sigma / z
    found = torch.where(z > 1e4, -sigma / z.clamp(min=1.0), mu - sigma * ratio)
    return found.clamp(max=0.0).to(mean.dtype)


def partial_l2(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance that leaves out what is negative in both, and lower in the student.

    .. math::
        \sum_i \begin{cases} 0 & S_i \le T_i \le 0 \\ (T_i - S_i)^2 & \text{otherwise} \end{cases}

    Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019.

    Args:
        student: (B, ...).
        teacher: of the same shape.

    Returns:
        (B,), summed over the elements.
    """
    s, t = _wide(student), _wide(teacher)
    gap = torch.where((s <= t) & (t <= 0), torch.zeros_like(s), t - s)
    return gap.pow(2).flatten(1).sum(1)


def factor_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean absolute difference of two factors of unit length.

    .. math:: \frac{1}{n} \Big\| \frac{F_S}{\|F_S\|_2} - \frac{F_T}{\|F_T\|_2} \Big\|_1

    Kim et al., *Paraphrasing Complex Network: Network Compression via Factor Transfer*, NeurIPS 2018 (p = 1). The mean
    over the n elements is that of the authors' code. (Tian et al.'s benchmark, ICLR 2020, takes other factors: the mean
    of the squares over the channels.) A factor of zeros stays zero, and gets no gradient.

    Args:
        student: (B, ...).
        teacher: of the same shape.

    Returns:
        (B,).
    """
    s, t = (unit(_wide(x).flatten(1)) for x in (student, teacher))
    return (s - t).abs().mean(1)


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    r"""Negative log-likelihood of a target under a Gaussian with one variance for each channel, less a constant.

    .. math:: \frac{1}{n} \sum_{c, p} \Big( \tfrac12 \log \sigma_c^2 + \frac{(t_{cp} - \mu_{cp})^2}{2 \sigma_c^2} \Big)

    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, CVPR 2019. The mean over the n elements
    is that of the authors' code, and of the weights in use.

    Args:
        mean: (B, C, H, W), or (B, ..., C).
        variance: (C,), above 0.
        target: of the shape of ``mean``.

    Returns:
        (B,), negative where the variance is small and the mean right.
    """
    mu, t = _wide(mean), _wide(target)
    v = _wide(variance).view(-1, 1, 1) if mu.ndim == 4 else _wide(variance)
    return (0.5 * (v.log() + (t - mu).pow(2) / v)).flatten(1).mean(1)
