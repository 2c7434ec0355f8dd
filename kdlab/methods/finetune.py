"""Training on labels alone: from nothing, or from a pretrained network with some of it frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdlab.errors import UserError
from kdlab.methods.method import Method
from kdlab.models import freeze as freeze_layers


class FineTune(Method):
    """Method that learns from the labels alone, without a teacher.

    Args:
        freeze: layers to freeze: none (None), ``backbone`` (all but the head), or module paths whose parameters stay as
            they are; their BatchNorm keeps its statistics.
        patience: number of epochs without a better validation score after which training stops; None trains all epochs.
        **shared: arguments of :class:`~kdlab.methods.Method`.
    """

    weights_file = "model_finetuned.pt"

    def __init__(
        self,
        *,
        freeze: str | Sequence[str] | None = None,
        patience: int | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if patience is not None and patience < 1:
            raise UserError("method.patience", patience, "a whole number of epochs, at least 1, or null")
        self.patience = patience
        freeze_layers(self.student, freeze)
