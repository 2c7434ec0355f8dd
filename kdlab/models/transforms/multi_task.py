"""One trunk, a classifier for each of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.models.transforms.surgery import head_of


class Heads(nn.Module):
    """Network that answers several tasks at once: its own classifier gives way to a linear one for each.

    Caruana, *Multitask Learning*, Machine Learning 1997: hard sharing of all that comes before the heads.

    Args:
        net: a classifier that ends with a linear layer, which it loses.
        tasks: name → number of classes, in order.

    Shape: what ``net`` takes, to a mapping: name of the task → logits (B, classes), and ``logits``, the first task's.

    Layers to tap: ``net.layer1`` and so on, as ``net`` calls them; ``heads.NAME`` the logits of a task.

    Raises:
        UserError: for fewer than two tasks, a name that no head can have, or a network that ends otherwise.
    """

    def __init__(self, net: nn.Module, tasks: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if tasks is None or len(tasks) < 2:
            raise UserError("tasks", f"{list(tasks or ())}", "two or more, such as data.label=[digit,parity] names")
        name, head = head_of(net)
        if not name or not isinstance(head, nn.Linear):
            raise UserError("net", f"{type(net).__name__} does not end with a linear classifier", "one that does")
        taken = {"logits", *dir(nn.ModuleDict())}
        if bad := [task for task in tasks if not str(task).isidentifier() or task in taken]:
            raise UserError(
                "tasks", f"{bad[0]!r}", "letters, digits and underscores, and no name that a module has already"
            )
        net.set_submodule(name, nn.Identity())
        self.net = net
        self.heads = nn.ModuleDict({task: nn.Linear(head.in_features, classes) for task, classes in tasks.items()})

    @property
    def classifiers(self) -> list[str]:
        """The dotted names of all its classifiers."""
        return [f"heads.{task}" for task in self.heads]

    @override
    def forward(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        feature = self.net(*inputs, **named)
        logits = {task: head(feature) for task, head in self.heads.items()}
        return {"logits": next(iter(logits.values())), **logits}
