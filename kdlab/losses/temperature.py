"""How sharp the soft targets are: constant, scheduled, learned, or set per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Schedule, reverse_gradient, schedule, standardize

# above this, z / T leaves so little of float32 that KL drowns in rounding; see tests/test_losses.py
_WIDE_ABOVE = 64.0

LEAST, GREATEST = 0.01, 1e6
"""Temperatures at which float32 carries the soft targets.

Measured on logits of deviation 3 and 5 in 10 classes: at 1e-3 the gradients of JSD, reverse and skewed KL and total
variation are nothing but rounding, and those of the others shrink with T, until Adam's epsilon swallows them; the
values have five digits left at 1e6, three at 1e7, two at 1e8, none at 1e10.
"""


def check_temperature(key: str, least: float, greatest: float | None = None) -> None:
    """Refuse temperatures outside of what :data:`LEAST` and :data:`GREATEST` allow.

    Args:
        key: key of the setting, for messages.
        least: a temperature, or the least of several.
        greatest: the greatest of several; None for one.

    Raises:
        UserError: names the first one that is outside.
    """
    greatest = least if greatest is None else greatest
    if not least > 0:
        raise UserError(key, f"{least:g}", "a number above 0")
    if least < LEAST or not greatest <= GREATEST:
        wrong = least if least < LEAST else greatest
        raise UserError(key, f"{wrong:g}", f"{LEAST:g} to {GREATEST:g}, which float32 arithmetic can follow")


def _divide(logits: Tensor, by: float | Tensor, widen: bool) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.double() if widen else logits.float()
    if isinstance(by, Tensor):
        # the slope of z / T in T is -z / T², infinite for a masked class: times that class's gradient of 0 it is NaN
        logits = logits.clamp(min=torch.finfo(torch.float32).min * 1e-6)
    return logits / by


class Temperature(nn.Module):
    """Temperature that is a number, or a schedule over training.

    ``soften`` divides both logits by T and says by what to multiply the divergence: T², which keeps its gradient from
    shrinking as T grows (Hinton et al., NIPS 2014 workshop).

    Args:
        value: T above 0, or ``{start, end, shape}``.
    """

    all_classes = False
    """Whether it looks at a row's logits as a whole, and so cannot soften a few buckets of classes."""

    def __init__(self, value: float | Mapping | Schedule = 1.0) -> None:
        super().__init__()
        self.schedule = schedule(value, "loss.temperature", least=0.0)
        check_temperature("loss.temperature", *self.schedule.range)
        self.progress = 0.0

    @property
    def now(self) -> float:
        """T at the present point of training."""
        return self.schedule(self.progress)

    def soften(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return both logits (rows, C) divided by T, and the factor T²."""
        t = self.now
        wide = t > _WIDE_ABOVE
        return _divide(student, t, wide), _divide(teacher, t, wide), t * t


class StandardizedTemperature(Temperature):
    """Logit standardisation: each row's logits become z-scores, then are divided by a base temperature.

    Every sample thereby has its own temperature, the standard deviation of its logits times ``base``, and the student
    need not match the teacher's scale. The factor is ``base``².

    Sun et al., *Logit Standardization in Knowledge Distillation*, CVPR 2024 (their base is 2; their code's deviation is
    another one, see :func:`~kdlab.functional.standardize`).
    """

    all_classes = True

    def __init__(self, base: float | Mapping | Schedule = 2.0) -> None:
        super().__init__(base)

    @override
    def soften(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        return super().soften(standardize(student), standardize(teacher))


class LearnedTemperature(Temperature):
    r"""Temperature that is trained against the student, from easy to hard.

    .. math:: T = T_{low} + (T_{high} - T_{low})\,\sigma(\theta)

    :math:`\theta` receives the reversed gradient, times a strength that grows from 0 to ``strength`` along half a
    cosine over the first part of training. Without the reversal T would only shrink, since that makes T²·KL smaller.

    Li et al., *Curriculum Temperature for Knowledge Distillation*, AAAI 2023 (their global form). The defaults are
    those of the authors' code for CIFAR-100: T between 1 and 21 from :math:`1 + 20\,\sigma(1)` on, and the whole
    strength after 10 of 240 epochs (after 5 on ImageNet). Theirs steps once an epoch, this one continuously.

    Args:
        start: T at the beginning, strictly between ``low`` and ``high``.
        low: least T.
        high: greatest T.
        strength: factor of the reversed gradient once it is whole.
        until: share of training, in (0, 1], after which it is.
    """

    def __init__(
        self,
        start: float = 15.62,
        low: float = 1.0,
        high: float = 21.0,
        strength: float = 1.0,
        until: float = 10 / 240,
    ) -> None:
        super().__init__(start)
        numbers = all(isinstance(v, int | float) for v in (start, low, high))
        if not numbers or not 0 < low < start < high < math.inf:
            raise UserError("loss.temperature", f"start {start}, low {low}, high {high}", "0 < low < start < high")
        check_temperature("loss.temperature", low, high)
        share = (start - low) / (high - low)
        self.low, self.high = low, high
        self.theta = nn.Parameter(torch.tensor(math.log(share / (1 - share))))
        self.theta.no_decay = True  # type: ignore[attr-defined]  # decay would pull T to the middle of its range
        course = {"start": 0.0, "end": strength, "shape": "cosine", "until": until}
        self.strength = schedule(course, "loss.temperature.strength", least=0.0)  # below 0 would undo the reversal

    def _value(self) -> Tensor:
        theta = reverse_gradient(self.theta, self.strength(self.progress))
        return self.low + (self.high - self.low) * theta.sigmoid()

    @override
    @property
    def now(self) -> float:
        return float(self._value().detach())

    @override
    def soften(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        t = self._value()
        wide = self.high > _WIDE_ABOVE
        return _divide(student, t, wide), _divide(teacher, t, wide), t * t


def temperature(value: float | Mapping | Schedule | Temperature) -> Temperature:
    """Build a temperature from a number, a schedule, or a temperature itself."""
    return value if isinstance(value, Temperature) else Temperature(value)
