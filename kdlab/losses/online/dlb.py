"""DLB: the network's own last step teaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, Schedule, dense
from kdlab.losses.online.mutual import Agreement
from kdlab.losses.temperature import Temperature


class DLB(Agreement):
    r"""Self-distillation from the last mini-batch: a row that the step before held agrees with its output then.

    .. math:: T^2\, \mathrm{KL}\big(p_{t-1}(T \mid x) \,\|\, p_t(T \mid x)\big)

    0 for a row that it did not hold. Shen et al., *Self-Distillation from the Last Mini-Batch for Consistency
    Regularization*, CVPR 2022, who average over those rows alone: where they are half of a step, twice the weight is
    the same.

    Buffers ``examples`` (n,) and ``said`` (n, C) hold the rows shown last, as many as a step has, and their logits.
    """

    pairing = "repeat_half"
    examples: Tensor
    said: Tensor

    def __init__(
        self,
        temperature: float | Mapping | Schedule | Temperature = 3.0,
        weight: float | Mapping | Schedule = 1.0,
    ) -> None:
        super().__init__(temperature, weight)
        self.register_buffer("examples", torch.empty(0, dtype=torch.int64))
        self.register_buffer("said", torch.empty(0, 0))

    @override
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        if batch.example_id is None:
            raise UserError(
                "batch", "its rows have no number (Batch.example_id)", "data without mixing, such as digits"
            )
        logits, examples = dense(student.logits), batch.example_id[:, 0]
        if not len(self.examples):
            value = logits[:, :0].float().sum(1)  # of the graph, so that backward is legal; 0 * -inf would be nan
        else:
            same = examples[:, None] == self.examples
            # the last of equals: a row may have been shown twice within a step
            last = (same * torch.arange(1, len(self.examples) + 1, device=same.device)).argmax(1)
            value = self.kl(logits, self.said[last])
            value = torch.where(same.any(1), value, 0.0)
        if self.training and torch.is_grad_enabled():  # a look at the term changes nothing
            self._remember(examples, logits.detach(), batch)
        return value

    def _remember(self, examples: Tensor, logits: Tensor, batch: Batch) -> None:
        whole = len(batch) * (batch.window.parts if batch.window is not None else 1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        before = self.said.new_empty(0, wide.shape[1], dtype=wide.dtype) if not len(self.examples) else self.said
        self.examples = torch.cat([self.examples.to(examples.device), examples])[-whole:]
        self.said = torch.cat([before.to(wide.device), wide])[-whole:]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        for name in ("examples", "said"):  # as many rows as the step had
            if (kept := state.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(kept, device=getattr(self, name).device))
        super()._load_from_state_dict(state, prefix, *more)
