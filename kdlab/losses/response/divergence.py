"""Divergences between the softened answers of student and teacher: KL and its relatives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import (
    Batch,
    Outputs,
    Sampled,
    Schedule,
    align_logits,
    dense,
    jsd,
    kl,
    logit_squared_error,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.temperature import Temperature
from kdlab.ranges import share


class Divergence(SoftTerm):
    r"""Divergence of the softened outputs, times T to the power of its ``order``; one value per row, in float32.

    As T grows, the softened outputs of both come to differ by a multiple of 1/T. A divergence of order n goes with the
    n-th power of that difference, so that times Tⁿ neither it nor its gradient shrinks.

    Takes every form of logits. Against :class:`~kdlab.functional.Sparse` ones, the kept classes and the bucket of all
    others are softened and compared.
    """

    order = 2
    """Power of T: 2 for all that look like a squared difference near 0 (KL and its kin), 1 for total variation."""

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence (rows,) of softened logits (rows, C)."""
        raise TypeError(f"{type(self).__name__} does not say what it measures: define divergence")

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if self.temperature.all_classes:
            s, t = dense(student.logits), dense(teacher.logits)
        else:
            s, t = align_logits(student.logits, teacher.logits)
        s, t, factor = self.temperature.soften(s, t)
        value = self.divergence(s, t)
        return value * (factor if self.order == 2 else factor**0.5)


class KL(Divergence):
    r"""Hinton's distillation term: KL of the softened student from the softened teacher, times T².

    .. math:: T^2 \sum_c p^T_c(T)\,\big(\log p^T_c(T) - \log p^S_c(T)\big), \qquad p(T) = \mathrm{softmax}(z / T)

    Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, NIPS 2014 workshop. Against
    :class:`~kdlab.functional.Sampled` targets it is estimated without bias, at temperature 1.

    Args:
        weight: see :class:`~kdlab.losses.Term`.
        temperature: see :class:`SoftTerm`.
        class_mean: divide by the number of classes C, as ``torch.nn.KLDivLoss()`` does by default. Some published code
            does so (ARD, RSLAD); their learning rates and weight decays go with a loss that is C times smaller.
    """

    def __init__(
        self,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
        class_mean: bool = False,
    ) -> None:
        super().__init__(weight, temperature)
        self.class_mean = class_mean

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl(student, teacher)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        value = self._summed(student, teacher, batch)
        return value / student.logits.shape[-1] if self.class_mean else value

    def _summed(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        if not isinstance(teacher.logits, Sampled):
            return super().forward(student, teacher, batch)
        if self.temperature.now != 1 or self.temperature.all_classes:
            given = f"{type(self.temperature).__name__} of {self.temperature.now:g}"
            raise UserError("loss.temperature", f"{given} with sampled targets", "1, at which they were drawn")
        return teacher.logits.kl(dense(student.logits))


class ReverseKL(Divergence):
    r"""``KL(student || teacher)``, times T²: prefers one of the teacher's modes to the average of all.

    .. math:: T^2 \sum_c p^S_c(T)\,\big(\log p^S_c(T) - \log p^T_c(T)\big)

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, ICLR 2024 (token by token; their policy
    gradient is not part of it). Finite but of about 1e31 where the teacher's probability is exactly 0.
    """

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher)


class SymmetricKL(Divergence):
    r"""Mean of KL in both directions (half of Jeffreys' divergence), times T².

    .. math:: \tfrac{T^2}{2} \sum_c \big(p^T_c(T) - p^S_c(T)\big)\big(\log p^T_c(T) - \log p^S_c(T)\big)

    Jeffreys, *An Invariant Form for the Prior Probability in Estimation Problems*, Proc. R. Soc. A 1946.
    """

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return symmetric_kl(student, teacher)


class _Skewed(Divergence):
    """Base of the divergences to a mixture of both.

    Args:
        skew: share of the first distribution in the mixture, in [0, 1); alpha in the paper, where it is 0.1.
        weight: see :class:`~kdlab.losses.Term`.
        temperature: see :class:`SoftTerm`.
    """

    def __init__(
        self,
        skew: float = 0.1,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight, temperature)
        share("skew", skew, one=False)
        self.skew = skew


class SkewKL(_Skewed):
    r"""KL from the teacher to a mixture of both, times T².

    .. math:: T^2\, \mathrm{KL}\big(p^T \,\|\, \lambda p^T + (1 - \lambda) p^S\big), \qquad \lambda = skew

    Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024.
    """

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return skew_kl(student, teacher, self.skew)


class SkewReverseKL(_Skewed):
    r"""KL from the student to a mixture of both, times T².

    .. math:: T^2\, \mathrm{KL}\big(p^S \,\|\, (1 - \lambda) p^T + \lambda p^S\big), \qquad \lambda = skew

    Ko et al., *DistiLLM: Towards Streamlined Distillation for Large Language Models*, ICML 2024.
    """

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return skew_reverse_kl(student, teacher, self.skew)


class JSD(Divergence):
    r"""Generalised Jensen-Shannon divergence over β(1 - β), times T²: from KL (β = 0) to reverse KL (β = 1).

    .. math::
        \frac{T^2}{\beta (1 - \beta)} \Big( \beta\,\mathrm{KL}(p^T \| m) + (1 - \beta)\,\mathrm{KL}(p^S \| m) \Big),
        \qquad m = \beta p^T + (1 - \beta) p^S

    Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, ICLR 2024, do
    not divide, so that theirs vanishes at both ends; see :func:`~kdlab.functional.jsd`.

    Args:
        beta: share of the teacher in the mixture, in [0, 1].
        weight: see :class:`~kdlab.losses.Term`.
        temperature: see :class:`SoftTerm`.
    """

    def __init__(
        self,
        beta: float = 0.5,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight, temperature)
        share("beta", beta)
        self.beta = beta

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return jsd(student, teacher, self.beta)


class TotalVariation(Divergence):
    r"""Half the summed difference of the probabilities, times T (not T²: it goes with the difference itself).

    .. math:: \tfrac{T}{2} \sum_c |p^T_c(T) - p^S_c(T)|

    Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*, ACL 2023.
    """

    order = 1

    @override
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return total_variation(student, teacher)


class LogitMSE(SoftTerm):
    r"""Mean squared difference of the logits, :math:`\tfrac{1}{C}\|z^S - z^T\|^2`; takes no temperature.

    Ba & Caruana, *Do Deep Nets Really Need to be Deep?*, NIPS 2014. It is the limit of T²·KL for T → ∞ (times 2, and
    without the mean of the logits). Classes that either masks (``-inf``) are left out.
    """

    def __init__(self, weight: float | Mapping | Schedule = 1.0) -> None:
        super().__init__(weight, temperature=1.0)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return logit_squared_error(dense(student.logits), dense(teacher.logits))
