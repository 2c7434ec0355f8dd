"""Teachers made of the student's own past: a running average, or snapshots."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs
from kdlab.ranges import share
from kdlab.tasks import Task
from kdlab.teachers.teacher import Teacher


class MovingTeacher(Teacher):
    """Base of the teachers made of the student's own past; subclasses say when and how they follow.

    Args:
        task: task by which the network reads a batch.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.net: nn.Module | None = None

    def _copy(self, student: nn.Module) -> None:
        self.net = copy.deepcopy(student).eval().requires_grad_(False)

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs | None:
        return None if self.net is None else self.task.outputs(self.net, batch, self.layers)

    @override
    def to(self, device: torch.device) -> MovingTeacher:
        if self.net is not None:
            self.net.to(device)
        return self

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.net is None else dict(self.net.state_dict())

    @override
    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        if state:
            self._copy(student)
            assert self.net is not None
            self.net.load_state_dict(state)


class EMATeacher(MovingTeacher):
    r"""Exponential moving average of the student's weights; BatchNorm statistics are copied as they are.

    .. math:: \theta_T \leftarrow d\,\theta_T + (1 - d)\,\theta_S, \qquad d = \min(decay, (1+n)/(10+n))

    after step n; the ramp keeps the first, random weights from lingering. Tarvainen & Valpola, *Mean teachers are
    better role models*, NIPS 2017.

    Args:
        task: task by which the network reads a batch.
        decay: greatest decay of the average, in [0, 1).
    """

    def __init__(self, task: Task, decay: float = 0.99) -> None:
        super().__init__(task)
        share("method.decay", decay, one=False)
        self.decay = decay
        self.steps = 0

    @override
    @torch.no_grad()
    def update(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        if self.net is None:
            self._copy(student)
        if not step_done:
            return
        assert self.net is not None
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        mine, student_parameters = [p.data for p in self.net.parameters()], list(student.parameters())
        torch._foreach_lerp_(mine, [p.detach() for p in student_parameters], 1 - decay)
        for own, new in zip(self.net.buffers(), student.buffers(), strict=True):
            own.copy_(new)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"net": super().state_dict(), "steps": self.steps}

    @override
    def restore(self, state: dict[str, Any], student: nn.Module) -> None:
        super().restore(state.get("net", {}), student)
        self.steps = int(state.get("steps", 0))

    @override
    def describe(self) -> str:
        return f"the running average of the student (decay {self.decay:g})"


class SnapshotTeacher(MovingTeacher):
    """Student as it was at the last snapshot: no teacher at first, its earlier self in the last epochs.

    A snapshot is taken at the start of the epoch where a share ``begin`` of training is over, and again every
    ``every`` epochs. Yang et al., *Snapshot Distillation*, CVPR 2019.

    Args:
        task: task by which the network reads a batch.
        begin: share of the epochs without a teacher, in (0, 1).
        every: epochs from one snapshot to the next; None keeps the first.
    """

    def __init__(self, task: Task, begin: float = 0.5, every: int | None = None) -> None:
        super().__init__(task)
        share("method.begin", begin, zero=False, one=False)
        if every is not None and every < 1:
            raise UserError("method.every", every, "a whole number of epochs, at least 1")
        self.begin, self.every = begin, every

    @override
    def update(self, student: nn.Module, epoch: int, epochs: int, step_done: bool) -> None:
        first = min(math.ceil(self.begin * epochs), epochs - 1)
        if step_done or epoch < max(first, 1):
            return
        if epoch == first or (self.every and (epoch - first) % self.every == 0):
            self._copy(student)

    @override
    def describe(self) -> str:
        again = f", anew every {self.every} epochs" if self.every else ""
        return f"the student's earlier self, from {self.begin:.0%} of training on{again}"
