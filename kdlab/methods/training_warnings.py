"""Checks that a fit learned anything: messages for one whose numbers are finite and mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdlab.tasks import Task

FAINT = 1e-10
"""Largest gradient that moves no weight: a hundredth of Adam's epsilon, a tenth of float32's resolution at 0.01."""

FAR = 10.0
"""Multiple of the cross-entropy of equally probable classes, above which training has diverged."""


def trace(net: nn.Module) -> Tensor:
    """Return the sum of each trained weight of ``net`` (in float64 if possible), by which changes show."""
    trained = [p.detach() for p in net.parameters() if p.requires_grad]
    sums = [p.sum(dtype=torch.float32 if p.device.type == "mps" else torch.float64) for p in trained]
    return torch.stack(sums).cpu() if sums else torch.zeros(0)


def greatest(gradients: list[Tensor]) -> Tensor | None:
    """Return the largest absolute value in some gradients, on their device; None where all are empty or sparse."""
    dense = [one for one in gradients if one.numel() and one.layout == torch.strided]
    return torch.stack([norm.float() for norm in torch._foreach_norm(dense, math.inf)]).max() if dense else None


def nothing_learned(unchanged: bool, gradient: float | None, curves: Mapping[str, float], steps: int) -> str | None:
    """Return a message where training moved nothing, with the parts of the loss; None where it moved something.

    Args:
        unchanged: whether every trained weight is what it was before.
        gradient: largest absolute value seen in a gradient; None where none was looked at.
        curves: the last means of the loss and its terms.
        steps: number of optimizer steps.
    """
    if unchanged:
        what = f"no weight changed in {steps} steps"
    elif gradient is not None and gradient < FAINT:
        what = f"no gradient was above {gradient:.0e} in {steps} steps"
    else:
        return None
    terms = ", ".join(f"{name} {value:.3g}" for name, value in curves.items())
    return f"nothing was learned: {what} ({terms}); look at optimizer.lr, and at weights and temperature of the loss"


def no_use(measures: Mapping[str, float], task: Task) -> str | None:
    """Return a message where the best epoch is no better on validation data than an untrained network; else None.

    Args:
        measures: measures of the best epoch on the validation split; may be empty.
        task: task that names the deciding measure, and its chance level.
    """
    score, chance = measures.get(task.score), task.chance
    ce, untrained = measures.get("ce"), math.log(max(task.num_classes, 2))
    if ce is not None and ce > FAR * untrained:
        return (
            f"it diverged: val ce {ce:.3g}, where one that knows nothing has {untrained:.3g}; a smaller optimizer.lr, "
            "or trainer.clip=1, may help"
        )
    if score is not None and (score <= chance if task.greater else score >= chance):
        return f"it is no better than chance: val {task.score} {score:.3g}, chance {chance:.3g}"
    return None
