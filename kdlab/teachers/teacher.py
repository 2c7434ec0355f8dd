"""What every teacher has in common, and the two that stay as they are: frozen, and an ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, log_probabilities
from kdlab.tasks import Task


class Teacher:
    """A source of outputs to learn from.

    Not an ``nn.Module``, so that no LightningModule can put it into its ``state_dict``, its optimizer or its train
    mode. ``state_dict`` holds what a resumed run needs, and only teachers that move (EMA, snapshot) have any.
    """

    layers: tuple[str, ...] = ()
    """Module paths to capture in ``features``."""

    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        """The outputs for a batch of ``split``, detached; None while there is no teacher yet."""
        raise TypeError(f"{type(self).__name__} does not say how to answer: define __call__")

    def to(self, device: torch.device) -> Teacher:
        """Move to ``device``."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on; empty for teachers that stay as they are."""
        return {}

    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        """Take back what :meth:`state_dict` gave; ``student`` shows the architecture."""

    def follow(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        """Look at the student, after an optimizer step (``step_done``) or at the start of epoch ``epoch``."""

    def describe(self) -> str:
        """One line for the log."""
        return type(self).__name__


class FrozenTeacher(Teacher):
    """A trained network that only answers: in eval mode, without gradient, its buffers untouched.

    Args:
        net: the network; it is put in eval mode and its parameters stop requiring gradients.
        task: how the network reads a batch.
        layers: module paths to capture.
    """

    def __init__(self, net: nn.Module, task: Task, layers: Sequence[str] = ()) -> None:
        self.net = net.eval().requires_grad_(False)
        self.task = task
        self.layers = tuple(layers)

    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs:
        # somebody may have called train() on it, or on a parent of some of its layers; a BatchNorm would drift
        if any(module.training for module in self.net.modules()):
            self.net.eval()
        return self.task.outputs(self.net, batch, self.layers)

    def to(self, device: torch.device) -> FrozenTeacher:
        self.net.to(device)
        return self

    def describe(self) -> str:
        return "live teacher: one forward pass a step"


class EnsembleTeacher(Teacher):
    """The mean of several teachers' probabilities, given as logits (their logarithm).

    Args:
        members: at least one teacher.
        weights: one weight each, normalised to sum to 1; None weighs all alike.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise UserError("teacher: an ensemble of none; accepted: at least one member")
        if weights is not None and (
            len(weights) != len(members) or min(weights) < 0 or not 0 < sum(weights) < math.inf
        ):
            raise UserError(f"teacher.weights: {list(weights)}; accepted: {len(members)} numbers of at least 0")
        self.members = list(members)
        share = list(weights) if weights is not None else [1.0] * len(members)
        self.weights = [w / sum(share) for w in share]

    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        answers = [member(batch, split) for member in self.members]
        known = [
            log_probabilities(a.logits) + torch.tensor(w).log()
            for a, w in zip(answers, self.weights, strict=True)
            if a is not None and w > 0
        ]
        return Outputs(torch.stack(known).logsumexp(0)) if known else None

    def to(self, device: torch.device) -> EnsembleTeacher:
        for member in self.members:
            member.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): state for i, member in enumerate(self.members) if (state := member.state_dict())}
        return {"members": states} if states else {}

    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        for i, mine in state.get("members", {}).items():
            self.members[int(i)].restore(mine, student)

    def follow(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        for member in self.members:
            member.follow(student, epoch, epochs, step_done)

    def describe(self) -> str:
        return f"ensemble of {len(self.members)}"
