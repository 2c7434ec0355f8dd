"""What every teacher has in common, and the two that stay as they are: frozen, and an ensemble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError, unknown
from kdlab.functional import Batch, Outputs, cross_entropy, dense, log_probabilities
from kdlab.losses.response.multi_teacher import MEMBER
from kdlab.tasks import Task

AT_ONCE = 2**22
"""Count of numbers of a member's logits that an ensemble makes at once."""


class Teacher:
    """Source of outputs to learn from.

    Not an ``nn.Module``, so that no LightningModule can put it into its ``state_dict``, its optimizer or its train
    mode. ``state_dict`` holds what a resumed run needs, and only teachers that move (EMA, snapshot) have any.
    """

    layers: tuple[str, ...] = ()
    """Module paths to capture in ``features``."""
    net: nn.Module | None = None
    """Network that answers; None where there is none yet, none that is live, or several."""

    @property
    def own_tokenizer(self) -> bool:
        """Whether the student's ids mean other tokens to its network."""
        return False

    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        """Return the outputs for a batch of ``split``, detached; None while there is no teacher yet."""
        raise TypeError(f"{type(self).__name__} does not say how to answer: define __call__")

    def to(self, device: torch.device) -> Teacher:
        """Move to ``device``."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to go on; empty for teachers that stay as they are."""
        return {}

    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        """Take back what :meth:`state_dict` gave; ``student`` shows the architecture."""

    def update(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        """Look at the student, after an optimizer step (``step_done``) or at the start of epoch ``epoch``."""

    def describe(self) -> str:
        """Return one line for the log."""
        return type(self).__name__


class FrozenTeacher(Teacher):
    """Trained network that only answers: in eval mode, without gradient, its buffers untouched.

    Args:
        net: the network; it is put in eval mode and its parameters stop requiring gradients.
        task: task by which the network reads a batch.
        layers: module paths to capture.
    """

    net: nn.Module

    def __init__(self, net: nn.Module, task: Task, layers: Sequence[str] = ()) -> None:
        self.net = net.eval().requires_grad_(False)
        self.task = task
        self.layers = tuple(layers)

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs:
        # somebody may have called train() on it, or on a parent of some of its layers; a BatchNorm would drift
        if any(module.training for module in self.net.modules()):
            self.net.eval()
        return self.task.outputs(self.net, batch, self.layers)

    @override
    def to(self, device: torch.device) -> FrozenTeacher:
        self.net.to(device)
        return self

    @override
    def describe(self) -> str:
        return "live teacher: one forward pass a step"


def confidence_weights(doubt: Tensor) -> Tensor:
    r"""Compute the weight of each of K teachers for a row, which falls with its cross-entropy with the row's label.

    .. math:: w_{ik} = \frac{1}{K-1}\Big(1 - \frac{e^{L_{ik}}}{\sum_j e^{L_{ij}}}\Big)

    Zhang, Chen & Wang, *Confidence-Aware Multi-Teacher Knowledge Distillation*, ICASSP 2022 (CA-MKD). They weigh the
    divergences at temperature T; here the probabilities at temperature 1 are weighed, as in every ensemble, and
    softened together. Their term on intermediate features is not part of it.

    Args:
        doubt: (K, rows) cross-entropies :math:`L`.

    Returns:
        (K, rows), at least 0; sums to 1 over K. One teacher alone weighs 1.
    """
    many = len(doubt) - 1
    return (1 - doubt.softmax(0)) / many if many else torch.ones_like(doubt)


class MultiTeacher(Teacher):
    """Teachers that answer together; the members move, and keep what a resumed run needs, as they would alone."""

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = list(members)

    @override
    def to(self, device: torch.device) -> MultiTeacher:
        for member in self.members:
            member.to(device)
        return self

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {str(i): state for i, member in enumerate(self.members) if (state := member.state_dict())}
        return {"members": states} if states else {}

    @override
    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        for i, mine in state.get("members", {}).items():
            self.members[int(i)].restore(mine, student)

    @override
    def update(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        for member in self.members:
            member.update(student, epoch, epochs, step_done)


class TasksTeacher(MultiTeacher):
    """Teachers of several tasks, one each: together they answer as one network with a head a task.

    Args:
        members: name of the task → its teacher.
        first: name of the task whose answers are ``logits``; None is the first member's.
    """

    def __init__(self, members: Mapping[str, Teacher], first: str | None = None) -> None:
        super().__init__(list(members.values()))
        self.tasks = tuple(members)
        self.first = first

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        answers = [member(batch, split) for member in self.members]
        logits = {name: one.logits for name, one in zip(self.tasks, answers, strict=True) if one is not None}
        return Outputs(logits.get(self.first or "", next(iter(logits.values()))), heads=logits) if logits else None

    @override
    def describe(self) -> str:
        each = zip(self.tasks, self.members, strict=True)
        return "a teacher a task: " + "; ".join(f"{name}: {member.describe()}" for name, member in each)


class EnsembleTeacher(MultiTeacher):
    r"""Weighted mean of several teachers' probabilities, given as dense logits (their logarithm).

    .. math:: p_{ic} = \sum_k w_{ik}\, p^k_{ic}, \qquad \sum_k w_{ik} = 1

    By ``confidence``, :math:`w_{ik}` follows from how well each member knows row i (:func:`confidence_weights`). Labels
    tell that in training only: on other splits nobody would know them, and what is measured there would be flattered.
    A row without a label goes by what a member's cross-entropy would be if it were right about itself, its entropy.

    Of constant weights, members answer one after the other, and some rows of each are made at a time: beside the mean
    there are never the logits (rows, C) of a member that brings them as :class:`~kdlab.functional.Projected`, nor those
    of two. Heads that all have, those of several tasks, are averaged likewise.

    Args:
        members: teachers, at least one.
        weights: weights of the members, normalised to sum to 1; None weighs all alike.
        weighting: ``mean`` for those weights, or ``confidence``.
        show: show each member's own logits too, as ``heads["member_0"]`` and so on, to a term that weighs them.
    """

    def __init__(
        self,
        members: Sequence[Teacher],
        weights: Sequence[float] | None = None,
        weighting: Literal["mean", "confidence"] = "mean",
        show: bool = False,
    ) -> None:
        if not members:
            raise UserError("teacher", "an ensemble of none", "at least one member")
        if weighting not in ("mean", "confidence"):
            raise unknown("teacher.weighting", weighting, ("mean", "confidence"))
        if weights is not None and (
            len(weights) != len(members) or min(weights) < 0 or not 0 < sum(weights) < math.inf
        ):
            raise UserError("teacher.weights", f"{list(weights)}", f"{len(members)} numbers of at least 0")
        if weights is not None and weighting == "confidence":
            raise UserError("teacher.weights", f"{list(weights)}, and confidence decides", "none")
        super().__init__(members)
        share = list(weights) if weights is not None else [1.0] * len(members)
        self.weights = [w / sum(share) for w in share]
        self.weighting, self.show = weighting, show

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        if self.weighting == "mean" and not self.show:
            mean: Tensor | None = None
            heads: dict[str, Tensor] = {}
            for member, weight in zip(self.members, self.weights, strict=True):
                answer = member(batch, split) if weight > 0 else None
                if answer is not None:
                    shared = answer.heads if mean is None else [name for name in heads if name in answer.heads]
                    heads = {n: self._plus(heads.get(n), answer.heads[n], math.log(weight)) for n in shared}
                    mean = self._plus(mean, answer.logits, math.log(weight))
            return None if mean is None else Outputs(mean, heads=heads)
        answers = [member(batch, split) for member in self.members]
        member_logits = {n: answer.logits for n, answer in enumerate(answers) if answer is not None}
        if not member_logits:
            return None
        if self.weighting == "mean":
            logits = None
            for n, own in member_logits.items():
                logits = self._plus(logits, own, math.log(self.weights[n])) if self.weights[n] > 0 else logits
        else:
            logits = self._by_confidence(list(member_logits.values()), batch, known=split == "train")
        assert logits is not None
        return Outputs(
            logits, heads={f"{MEMBER}{n}": dense(own) for n, own in member_logits.items()} if self.show else {}
        )

    @staticmethod
    def _by_confidence(member_logits: Sequence[Any], batch: Batch, known: bool) -> Tensor:
        """Compute the mean (rows, C) by confidence, as logarithms; ``known`` says whether labels may tell."""
        rows, classes = member_logits[0].shape
        size = max(AT_ONCE // (classes * len(member_logits)), 1)
        parts = []
        for start in range(0, rows, size) if rows else (0,):
            at = slice(start, start + size)
            each = torch.stack([log_probabilities(dense(logits[at])) for logits in member_logits])
            doubt = -(each.exp() * each).sum(-1)
            if known:
                part = batch.part(at)
                wrong = torch.stack([cross_entropy(one, part.targets) for one in each])
                doubt = torch.where(part.labelled, wrong.to(doubt.dtype), doubt)
            parts.append(torch.logsumexp(each + confidence_weights(doubt).log()[..., None], 0))
        return log_probabilities(torch.cat(parts))  # the logarithm of a masked class is no infinity again

    @staticmethod
    def _plus(mean: Tensor | None, logits: Any, log_weight: float) -> Tensor:
        """Add one member's weighted probabilities to the mean so far (rows, C), in place; both as logarithms."""
        rows, classes = logits.shape
        first = mean is None
        if mean is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            mean = torch.empty(rows, classes, dtype=dtype, device=logits.device)
        size = max(AT_ONCE // classes, 1)
        for start in range(0, rows, size):
            at = slice(start, start + size)
            own = log_probabilities(dense(logits[at])) + log_weight
            mean[at] = own if first else torch.logaddexp(mean[at], own)
        return mean

    @override
    def describe(self) -> str:
        how = "weighed by confidence" if self.weighting == "confidence" else "the mean"
        how = "weighed by the loss" if self.show else how
        return f"ensemble of {len(self.members)}, {how}: {'; '.join(m.describe() for m in self.members)}"
