"""What flows between data, networks and losses: a batch going in, outputs coming out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kdlab.errors import unknown
from kdlab.functional.logits import Projected, Sampled, Sparse

NO_LABEL = -100
"""Class id of a row without a label."""

Target = Literal["class", "next_token", "text"]
"""Target that is predicted of an example: its class, each next token of a sequence, or a text that answers to it."""

SEGMENTS = ("prompt", "reasoning", "answer", "text")
"""Segments that a token of a sequence can be part of; ``SequenceBatch.segment`` holds indices into it."""


class StepTotals(NamedTuple):
    """Counts of one optimizer step, over all its micro-batches and processes.

    An average over the step is exact, whatever the split, only if every part divides by the count of the whole;
    so the counts travel with each part.
    """

    labelled: float
    """Summed weight of the rows that have a label."""
    rows: float
    """Summed weight of all valid rows."""
    parts: int = 1
    """Number of micro-batches (over all processes) that the step is split into."""
    examples: float = 0.0
    """Summed weight (``SequenceBatch.sequence_weight``) of the sequences, where a row is a position of one; 0 where
    nobody counted."""
    partnered: float = 0.0
    """Summed weight of the rows that have a partner."""


@dataclass
class Batch:
    """One micro-batch.

    ``inputs`` is a tensor (B, ...) or a dict of tensors, which a network gets as keywords; ``targets`` holds class ids
    (B,), with ``-100`` for a row without a label, or soft targets (B, C), where an all-zero row has no label.
    """

    inputs: Tensor | dict[str, Tensor]
    targets: Tensor
    example_id: Tensor | None = None
    """Number of the example in the split, and of its view, (B, 2) int64: the key of every cache."""
    weight: Tensor | None = None
    """Weight of each row, (rows,) float; None is 1 for all."""
    partner: Tensor | None = None
    """Row of the same batch that each row is to agree with (another view of it, another of its class), (rows,) int64;
    -1 for none."""
    teacher_inputs: Tensor | dict[str, Tensor] | None = None
    """Inputs of the teacher where they are not ``inputs``, such as pictures before an attack."""
    hidden_targets: Tensor | None = None
    """Labels (B,) withheld from training, for curves about pseudo-labels alone."""
    tasks: dict[str, Tensor] | None = None
    """Name of each task → its class ids (B,), where there are several at once; ``targets`` are those of the first."""
    window: StepTotals | None = None

    @property
    def labelled(self) -> Tensor:
        """Mask (rows,) of the rows that have a label."""
        return self.targets != NO_LABEL if self.targets.ndim == 1 else self.targets.sum(-1) > 0

    def __len__(self) -> int:
        return self.targets.shape[0]

    def count(self, weight: Tensor | None = None) -> StepTotals:
        """Return the window of a batch that is a whole optimizer step by itself."""
        weight = self.weight if weight is None else weight
        labelled, paired = self.labelled, None if self.partner is None else self.partner >= 0
        if weight is None:
            counts = float(labelled.sum()), float(len(labelled))
            return StepTotals(*counts, partnered=0.0 if paired is None else float(paired.sum()))
        counts = float(weight[labelled].sum()), float(weight.sum())
        return StepTotals(*counts, partnered=0.0 if paired is None else float(weight[paired].sum()))

    def part(self, rows: slice) -> Batch:
        """Return the targets and weights of some of the rows; what counts by example stays whole."""
        tasks = None if self.tasks is None else {name: each[rows] for name, each in self.tasks.items()}
        weight = None if self.weight is None else self.weight[rows]
        return replace(self, targets=self.targets[rows], weight=weight, tasks=tasks)

    def of_task(self, name: str) -> Batch:
        """Return the batch as one of its tasks sees it.

        Raises:
            UserError: if it has no such task.
        """
        if self.tasks is None or name not in self.tasks:
            raise unknown("task", name, self.tasks or (), "task")
        return replace(self, targets=self.tasks[name], tasks=None)

    def clean_view(self) -> Batch:
        """Return the batch as the teacher reads it."""
        return self if self.teacher_inputs is None else replace(self, inputs=self.teacher_inputs, teacher_inputs=None)

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """Return this batch with every tensor on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class SequenceBatch(Batch):
    """One micro-batch of sequences, where a row is a position whose prediction counts.

    ``targets`` (rows,) holds the token that follows each of them.
    """

    loss_mask: Tensor = field(kw_only=True)
    """Mask (B, T) of the positions of the sequences that are the rows, in row-major order."""
    segment: Tensor | None = None
    """Segment of a sequence that the predicted token belongs to, (rows,) int64 indices into ``SEGMENTS``."""
    prompts: Tensor | None = None
    """Number of the tokens that are read of a sequence which are its prompt, given whoever writes the rest, (B,) int64;
    0 for running text. None where a line holds several sequences, or it is unknown."""
    sequence_weight: Tensor | None = None
    """Weight of each sequence as a whole, beside those of its tokens, (B,) float; None is 1 for all."""

    def part(self, rows: slice) -> SequenceBatch:
        """Return the targets, weights and segments of some of the rows; what counts by example stays whole."""
        part: Any = super().part(rows)
        part.segment = None if self.segment is None else self.segment[rows]
        return part


@dataclass
class Outputs:
    """Outputs of a network for a batch: logits of the valid rows, tapped features, further heads by name."""

    logits: Any
    """Logits (rows, C): a tensor, or :class:`~kdlab.functional.Projected`; a teacher's may also be
    :class:`~kdlab.functional.Sparse` or :class:`~kdlab.functional.Sampled`."""
    features: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Any, features: Mapping[str, Tensor] | None = None) -> Outputs:
        """Wrap what a network returned.

        Logits in any form, an object that has them, or a mapping of ``logits`` and further heads.
        """
        if isinstance(raw, Outputs):
            raw.features.update(features or {})
            return raw
        heads: dict[str, Tensor] = {}
        if isinstance(raw, Tensor | Projected | Sparse | Sampled):
            logits = raw
        elif type(raw) is dict:
            heads = {name: value for name, value in raw.items() if name != "logits"}
            logits = raw["logits"]
        else:
            logits = raw["logits"] if isinstance(raw, Mapping) else raw.logits
        return cls(logits, dict(features or {}), heads)

    def detach(self) -> Outputs:
        """Return the same outputs, cut from the graph."""
        cut = {k: v.detach() for k, v in self.features.items()}
        return Outputs(self.logits.detach(), cut, {k: v.detach() for k, v in self.heads.items()})


def as_probabilities(targets: Tensor, classes: int) -> Tensor:
    """Convert targets to probabilities (B, C); a row without a label is all zero."""
    if targets.ndim == 2:
        return targets.float()
    known = targets != NO_LABEL
    return torch.nn.functional.one_hot(targets.clamp(min=0), classes).float() * known[:, None]
