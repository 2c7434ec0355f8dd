"""Terms between networks that learn the same task at the same time (deep mutual learning)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, cross_entropy, dense, kl
from kdlab.losses.temperature import Temperature
from kdlab.losses.temperature import temperature as to_temperature
from kdlab.losses.term import LabelTerm, Term


def numbered(student: Outputs, kind: str, suffix: str = "") -> list[Tensor]:
    """Return the further outputs ``kind1``, ``kind2``, ... of a student, in order.

    Raises:
        UserError: if it has none.
    """
    outputs = {int(m[1]): v for k, v in student.heads.items() if (m := re.fullmatch(rf"{kind}(\d+){suffix}", k))}
    if not outputs:
        raise UserError("student", f"no output {kind}1{suffix}", f"a network beside which auxiliary={kind}s trains")
    return [dense(outputs[n]) for n in sorted(outputs)]


class PeersCE(LabelTerm):
    r"""Cross-entropy of every peer with the labels, summed over the peers: what each learns by itself.

    .. math:: \sum_{k} -\log p^k_{y}

    over the auxiliary of a :class:`~kdlab.models.transforms.auxiliary.Peers`; the student's own is another term
    (:class:`~kdlab.losses.CrossEntropy`). Zhang et al., *Deep Mutual Learning*, CVPR 2018.
    """

    auxiliary = "peers"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        peers = numbered(student, "peer")
        return torch.stack([cross_entropy(logits, batch.targets) for logits in peers]).sum(0)


class Agreement(Term):
    """KL of softened outputs from others of the same student or step, times T²; no gradient flows into the others.

    Args:
        temperature: T; its own, whatever the objective's is.
        weight: see :class:`~kdlab.losses.Term`.
    """

    needs_teacher = False

    def __init__(
        self,
        temperature: float | Mapping | Schedule | Temperature = 1.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        self.temperature = to_temperature(temperature)

    def kl(self, student: Tensor, other: Tensor) -> Tensor:
        """Compute the KL (rows,) of logits (rows, C) from ``other`` ones, times T²."""
        s, t, factor = self.temperature.soften(student, other.detach())
        return factor * kl(s, t)


class MutualKL(Agreement):
    r"""Mutual learning of student and peers: KL of each from every other, averaged over the others, and summed.

    .. math:: T^2 \sum_{k=0}^{K} \frac1K \sum_{l \ne k} \mathrm{KL}\big(p^l(T) \,\|\, p^k(T)\big)

    0 is the student, 1 to K its peers; no gradient flows into who teaches (:math:`p^l`). Zhang et al., *Deep Mutual
    Learning*, CVPR 2018, whose T is 1; they update the networks one after the other, here all learn from what the
    others say before the step.
    """

    auxiliary = "peers"

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        every = [dense(student.logits), *numbered(student, "peer")]
        divergences = [self.kl(own, other) for k, own in enumerate(every) for n, other in enumerate(every) if n != k]
        return torch.stack(divergences).sum(0) / (len(every) - 1)
