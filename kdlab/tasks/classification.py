"""Classification: how a network reads a batch, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.data import DataModule
from kdlab.errors import UserError, unknown
from kdlab.functional import NO_LABEL, Batch, cross_entropy, dense, hash_seed
from kdlab.functional.attack import pgd
from kdlab.functional.modes import input_gradients
from kdlab.ranges import whole_number
from kdlab.tasks.class_measures import ClassMeasures, TaskMeasures, class_ids
from kdlab.tasks.task import Measures, Task


@dataclass(frozen=True)
class Attack:
    """Attack under which accuracy is measured: projected gradients on the cross-entropy, from a random start.

    Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018.

    Args:
        eps: greatest change of an input in [0, 1], in the maximum norm.
        steps: number of ascent steps.
        step_size: size of each step; None is 2.5 eps / steps, which reaches every place of the ball.
        seed: seed of the random start.
    """

    eps: float
    steps: int = 20
    step_size: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Attack:
        """Build an attack from a mapping.

        Raises:
            UserError: for a key that it has not, or a value out of its range.
        """
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                raise unknown("task.attack", str(key), known, "key")
        values: dict[str, Any] = {"eps": None, "steps": cls.steps, "step_size": None, **given}
        eps, steps, size = values["eps"], values["steps"], values["step_size"]
        if not _is_number(eps) or not 0 < eps <= 1:
            raise UserError("task.attack.eps", f"{eps!r}", "above 0, up to 1 (inputs are in [0, 1])")
        whole_number("task.attack.steps", steps)
        if size is not None and not (_is_number(size) and 0 < size < math.inf):
            raise UserError("task.attack.step_size", f"{size!r}", "above 0, or null")
        return cls(**given)


class Classification(Task):
    """Classification of images or vectors: one class for each.

    Args:
        num_classes: number of classes, at least 2.
        attack: also measure the accuracy under an attack, ``{eps: 0.1, steps: 20}`` (see :class:`Attack`), of finished
            networks, as ``robust_acc``; None does not.
        tasks: number of classes of each of several tasks at once, by name; None for one task.

    Raises:
        UserError: for an attack on several tasks.
    """

    def __init__(
        self, num_classes: int, attack: Mapping[str, Any] | None = None, tasks: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(num_classes)
        self.attack = None if attack is None else Attack.of(attack)
        self.tasks = dict(tasks or {})
        if self.tasks and self.attack:
            raise UserError("task.attack", f"{dict(attack or {})}, and there are several tasks", "null")

    @override
    @property
    def chance(self) -> float:
        if not self.tasks:
            return super().chance
        return sum(1 / classes for classes in self.tasks.values()) / len(self.tasks)

    @override
    def measures(self, words: int | None = None) -> Measures:
        return TaskMeasures(self.tasks) if self.tasks else ClassMeasures(self.num_classes)

    def further(self, net: nn.Module, data: DataModule, split: str, device: torch.device) -> dict[str, float]:
        """Compute ``robust_acc``: the share of rows that are right as they are, and still right under attack."""
        if self.attack is None:
            return {}
        right = rows = 0
        for number, batch in enumerate(data.ordered_loader(split)):
            stands = self._stands(net, batch.to(device), self.attack, number)
            right, rows = right + int(stands.sum()), rows + int(batch.labelled.sum())
        return {"robust_acc": right / rows} if rows else {}

    def _stands(self, net: nn.Module, batch: Batch, attack: Attack, number: int) -> Tensor:
        """Return which rows (rows,) a network classifies right before and after an attack; False without a label."""
        inputs = batch.inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise UserError("task.attack", "the inputs are no tensor of numbers", "null")
        if float(inputs.min()) < 0 or float(inputs.max()) > 1:
            raise UserError("task.attack", "the inputs leave [0, 1], in which it stays", "null, or pictures")
        classes = class_ids(batch.targets).masked_fill(~batch.labelled, NO_LABEL)

        def answer(x: Tensor) -> Tensor:
            return dense(self.outputs(net, replace(batch, inputs=x)).logits)

        draws = torch.Generator().manual_seed(hash_seed(attack.seed, number))
        start = (2 * torch.rand(inputs.shape, generator=draws) - 1).to(inputs)
        step = 2.5 * attack.eps / attack.steps if attack.step_size is None else attack.step_size
        with input_gradients(net, device=inputs.device):
            x = pgd(lambda x: cross_entropy(answer(x), classes), inputs, attack.eps, attack.steps, step, start)
            with torch.no_grad():
                return (answer(inputs).argmax(-1) == classes) & (answer(x).argmax(-1) == classes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
