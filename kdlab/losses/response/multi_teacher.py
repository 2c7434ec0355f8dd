"""Terms against several teachers, each of which is seen by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, Outputs, Schedule, cross_entropy, dense, kl, log_probabilities, masked_classes
from kdlab.losses.response.soft_term import SoftTerm
from kdlab.losses.temperature import Temperature

MEMBER = "member_"
"""Prefix of the name of the head with a teacher's logits, before its number."""

By = Literal["logits", "teacher"]


class MultiTeacherKL(SoftTerm):
    r"""KL of the student from a mixture of several teachers whose weights train along, row by row, times T².

    .. math::
        T^2\, \mathrm{KL}\Big(\sum_k w_{ik}\, p^k_i(T) \,\Big\|\, p^S_i(T)\Big) + \lambda\,\mathrm{CE}\Big(y_i,
        \sum_k w_{ik}\, p^k_i(1)\Big), \qquad w_i = \mathrm{softmax}(W a_i + b)

    Liu, Zhang & Wang, *Adaptive Multi-Teacher Multi-level Knowledge Distillation*, Neurocomputing 2020: each teacher
    has a trained vector that is compared with a representation of the example, and the softmax over teachers weighs
    their soft targets. Here the representation :math:`a_i` is the student's standardised logits instead of its pooled
    last feature map, so that it asks for no layer; the teacher's vector and the one it is projected by are one row of
    W; b lets a teacher be better on all. W and b start at 0, where all weigh alike. The weights see the student's
    logits without a gradient: it shall learn, not choose its teacher. Their hints on layers are not part of it.

    Of the divergence alone the weights would learn only who is easiest to follow; the second part, of labelled rows,
    is not in the paper, says who is right, and reaches nothing but W and b. ``supervision=0`` leaves it out.

    Reads ``teacher.heads["member_0"]`` and so on (rows, C), which an ensemble of ``teacher.weighting=learned`` gives.

    Args:
        by: ``logits`` for weights by row, ``teacher`` for b alone: one weight each.
        supervision: :math:`\lambda`, at least 0.
        weight: see :class:`~kdlab.losses.Term`.
        temperature: see :class:`SoftTerm`.
    """

    reads_members = True
    """Whether the teacher must show each of its members."""
    matrix: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        by: By = "logits",
        supervision: float = 1.0,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight, temperature)
        if by not in get_args(By):
            raise unknown("by", by, get_args(By))
        if not 0 <= supervision < float("inf"):
            raise UserError("supervision", supervision, "a finite number, at least 0")
        self.by, self.supervision = by, supervision
        self.register_parameter("matrix", None)
        self.register_parameter("bias", None)

    @override
    def prepare(self, student: Outputs, teacher: Outputs | None) -> None:
        members = _members(teacher)
        if self.bias is not None:
            return
        device, classes = student.logits.device, student.logits.shape[-1]
        self.bias = _weights(torch.zeros(len(members), device=device))
        if self.by == "logits":
            self.matrix = _weights(torch.zeros(len(members), classes, device=device))

    def log_weights(self, logits: Tensor) -> Tensor:
        """Compute the logarithms of the teachers' weights (rows, K), from the student's logits (rows, C)."""
        assert self.bias is not None, "prepare comes first"
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = self.bias.to(wide).expand(len(logits), -1)
        if self.matrix is not None:
            given = logits.detach().to(wide)
            given = given.masked_fill(masked_classes(given), 0.0)
            # of a row alone, so that it may be a chunk's; eps for rows that say nothing yet
            given = nn.functional.layer_norm(given, given.shape[-1:])
            scores = scores + (given[:, None, :] * self.matrix.to(wide)).sum(-1)
        return scores.log_softmax(-1)

    @override
    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        members = _members(teacher)
        own = dense(student.logits)
        log_w = self.log_weights(own)
        if log_w.shape[-1] != len(members):
            raise UserError("teacher", f"{len(members)} members, and weights of {log_w.shape[-1]}", "as many")
        softened = [self.temperature.soften(own, z) for z in members]
        s, _, factor = softened[0]
        value = factor * kl(s, _mixture([t for _, t, _ in softened], log_w))
        if not self.supervision:
            return value
        judged = cross_entropy(_mixture(members, log_w), batch.targets)
        return value + self.supervision * judged


def _weights(start: Tensor) -> nn.Parameter:
    made = nn.Parameter(start)
    made.no_decay = True  # type: ignore[attr-defined]  # decay would make all teachers alike
    return made


def _members(teacher: Outputs | None) -> list[Tensor]:
    """Return each teacher's logits, in order.

    Raises:
        UserError: if the teacher is one, or does not show its members.
    """
    heads = {} if teacher is None else teacher.heads
    members = [heads[f"{MEMBER}{n}"] for n in range(len(heads)) if f"{MEMBER}{n}" in heads]
    if not members:
        raise UserError(
            "members", "none that the teacher shows", "teacher.weighting=learned, with several teacher.members"
        )
    return members


def _mixture(members: list[Tensor], log_w: Tensor) -> Tensor:
    """Compute the logarithms of the weighted mean of probabilities (rows, C)."""
    each = torch.stack([log_probabilities(z) for z in members], -1)
    return torch.logsumexp(each + log_w[:, None, :], -1)
