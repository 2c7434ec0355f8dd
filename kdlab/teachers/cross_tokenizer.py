"""A teacher that splits text into other tokens than its student does."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.errors import UserError
from kdlab.functional import Batch, Outputs, SequenceBatch
from kdlab.tasks import Task
from kdlab.teachers.cache.sequences import SequenceSpan, sequences
from kdlab.teachers.teacher import FrozenTeacher


class TextTokenizer(Protocol):
    """Interface that a tokenizer must have."""

    size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> Any:
        """Return the ids of a text."""

    def decode(self, ids: Any) -> str:
        """Return the text of ids."""


class _Reading(NamedTuple):
    """One sequence in the teacher's tokens."""

    ids: list[int]
    prompt: int
    """Number of them that come before what the student is to predict."""


class CrossTokenizerTeacher(FrozenTeacher):
    """Trained network with a tokenizer of its own.

    The student's sequence is turned back into text, in two pieces that meet where its first row predicts; each is
    tokenised for the teacher, so that both begin to predict at the same character. From there the i-th row of the one
    is compared with the i-th of the other, to the end of the shorter, as Boizard et al. do (TMLR 2025); further on,
    tokens of unlike length drift apart. ``heads["paired"]`` (rows,) says which rows have a partner.

    Tokens that end a text are translated into one another. Text cut inside a character reads as a replacement
    character.

    Args:
        net: a decoder-only network; reads the teacher's ids.
        task: task by which a network reads a batch.
        tokenizer: tokenizer of the teacher.
        own: tokenizer of the student.
    """

    def __init__(self, net: nn.Module, task: Task, tokenizer: TextTokenizer, own: TextTokenizer) -> None:
        task = copy.copy(task)
        task.num_classes = tokenizer.size
        super().__init__(net, task)
        self.tokenizer, self.own = tokenizer, own

    @property
    @override
    def own_tokenizer(self) -> bool:
        """Whether the teacher's tokenizer really differs from the student's, so that ids mean other tokens to it."""
        teacher_fingerprint, student_fingerprint = (
            getattr(each, "fingerprint", None) for each in (self.tokenizer, self.own)
        )
        return self.tokenizer is not self.own and (
            teacher_fingerprint is None or teacher_fingerprint != student_fingerprint
        )

    @override
    @torch.no_grad()
    def __call__(self, batch: Batch, split: str = "train") -> Outputs:
        if isinstance(batch.inputs, dict) and "decoder_input_ids" in batch.inputs:
            raise UserError(
                "teacher",
                "an encoder-decoder with a tokenizer of its own",
                (
                    "the student's tokenizer, or the teacher's text instead of its probabilities "
                    "(kdlab generate, then data=traces)"
                ),
            )
        spans = sequences(batch)
        device = batch.targets.device
        targets = batch.targets.cpu()
        readings = [self._read(each, int(targets[each.rows.stop - 1])) for each in spans]
        teacher_batch = self._batch(readings).to(device)
        rows, paired = self._pair(spans, readings, len(batch))
        if not len(teacher_batch):
            nothing = torch.zeros(len(batch), self.tokenizer.size, device=device)
            return Outputs(nothing, heads={"paired": paired.to(device)})
        answer = super().__call__(teacher_batch, split)
        return Outputs(answer.logits[rows.to(device)], heads={"paired": paired.to(device)})

    def _read(self, stretch: SequenceSpan, last: int) -> _Reading:
        first = int(stretch.positions[0]) + 1
        ids = [*stretch.ids.tolist(), *([last] if last >= 0 else [])]
        prompt = self._translate(ids[:first])
        # a network must read something before it can predict
        prompt = prompt or [self.tokenizer.eos_id]
        together = [*prompt, *self._translate(ids[first:])]
        context = getattr(self.net, "context", None)
        # of what it reads; the last of them it only has to predict
        return _Reading(together if context is None else together[: context + 1], len(prompt))

    def _translate(self, ids: list[int]) -> list[int]:
        """Translate ids of the student to the teacher's ids of the same text."""
        out: list[int] = []
        piece: list[int] = []
        for token in ids:
            if token != self.own.eos_id:
                piece.append(token)
                continue
            out += [*self._encode(piece), self.tokenizer.eos_id]
            piece = []
        return out + self._encode(piece)

    def _encode(self, ids: list[int]) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(self.own.decode(ids))] if ids else []

    def _batch(self, readings: list[_Reading]) -> Batch:
        """Build a batch of one line a sequence, padded on the right."""
        longest = max((len(r.ids) for r in readings), default=1)
        ids = torch.full((len(readings), max(longest, 2)), self.tokenizer.pad_id)
        where = torch.zeros(len(readings), ids.shape[1] - 1, dtype=torch.bool)
        for line, reading in enumerate(readings):
            ids[line, : len(reading.ids)] = torch.tensor(reading.ids)
            where[line, reading.prompt - 1 : len(reading.ids) - 1] = True
        positions = torch.arange(where.shape[1]).expand(where.shape).contiguous()
        inputs = {"input_ids": ids[:, :-1].contiguous(), "position_ids": positions}
        return SequenceBatch(inputs, ids[:, 1:][where], loss_mask=where)

    @staticmethod
    def _pair(spans: list[SequenceSpan], readings: list[_Reading], rows: int) -> tuple[Tensor, Tensor]:
        """Return for each of the student's rows the teacher's, and whether there is one."""
        partner, paired = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
        start = 0
        for stretch, reading in zip(spans, readings, strict=True):
            there = max(len(reading.ids) - reading.prompt, 0)
            offset = torch.from_numpy(stretch.positions).long() - int(stretch.positions[0])
            paired[stretch.rows] = offset < there
            partner[stretch.rows] = torch.where(offset < there, start + offset, 0)
            start += there
        return partner, paired

    @override
    def describe(self) -> str:
        return (
            f"live teacher with a tokenizer of its own ({self.tokenizer.size} tokens, the student's has "
            f"{self.own.size}): the i-th token of an answer is compared with the i-th"
        )
