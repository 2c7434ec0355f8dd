"""Language modelling: which positions of a network's answer count, and what is measured of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kdlab.data import DataModule, TextData
from kdlab.errors import UserError, unknown
from kdlab.functional import (
    SEGMENTS,
    Batch,
    Outputs,
    Sampled,
    SequenceBatch,
    Sparse,
    align_logits,
    columns,
    cross_entropy,
    dense,
    kl,
)
from kdlab.functional.types import Target
from kdlab.ranges import whole_number
from kdlab.tasks.generation import Answers, Generation, open_ended, table
from kdlab.tasks.task import Task

log = logging.getLogger("kdlab")

SCORES = {"ppl": False, "ce": False, "acc": True}
"""Measures that may decide, and whether a greater one is better."""


class LanguageModeling(Task):
    """Language modeling: prediction of the next token at every position of ``SequenceBatch.loss_mask``.

    Args:
        vocab_size: ids of the tokenizer. A network whose output layer is padded beyond it is cut to it.
        score: the validation measure that decides: ``ppl``, ``ce`` or ``acc``. Measures of generated text, such as
            exact match, cost a decoding each and come once, at the end.
        new_tokens: the longest continuation that is generated, in tokens; a network's context may end it earlier. None
            is half as many again as the longest reference has, in training or in the split that asks (where the data
            cannot tell: as many as the context leaves), and 64 for running text.
        max_questions: greatest number of questions of a split, evenly chosen; None asks all.
        at_once: continuations that are generated together.
        passes: the k of pass@k; none draws no samples.
        samples: continuations drawn for each question; None is the greatest k.
        temperature: sampling temperature of those draws.
        top_p: probability mass that they are drawn from; 1 draws from the whole distribution.
        prompt: tokens shown of a sequence that has no question, for a continuation to read.
        seed: seed of the draws, which are a function of (seed, question, sample, position).

    Raises:
        UserError: for an argument out of its range.
    """

    target: Target = "next_token"

    def __init__(
        self,
        vocab_size: int,
        score: str = "ppl",
        new_tokens: int | None = None,
        max_questions: int | None = None,
        at_once: int = 64,
        passes: Sequence[int] = (),
        samples: int | None = None,
        temperature: float = 0.8,
        top_p: float = 1.0,
        prompt: int = 16,
        seed: int = 0,
    ) -> None:
        whole_number("task.vocab_size", vocab_size, 2)
        super().__init__(vocab_size)
        if score not in SCORES:
            raise unknown("task.score", score, SCORES, "measure")
        self.score, self.greater = score, SCORES[score]
        self.generation = Generation(
            new_tokens, max_questions, at_once, tuple(passes), samples, temperature, top_p, prompt, seed
        )
        self._cut: WeakSet[nn.Module] = WeakSet()

    def outputs(self, net: nn.Module, batch: Batch, layers: Iterable[str] = ()) -> Outputs:
        """Run ``net`` on a batch: the logits (rows, vocab_size) and the features (rows, d) of the positions that count.

        Raises:
            UserError: if the network has fewer outputs than the vocabulary has ids, or answers other positions.
        """
        outputs = super().outputs(net, batch, layers)
        if not isinstance(batch, SequenceBatch):
            return replace(outputs, logits=self._columns(net, outputs.logits))
        shape = batch.loss_mask.shape
        if outputs.logits.shape[:-1] != shape:
            raise UserError(
                "model",
                (
                    f"{type(net).__name__} answers with logits of shape {tuple(outputs.logits.shape)} for "
                    f"sequences of shape {tuple(shape)}"
                ),
                "one answer a position",
            )
        rows = batch.loss_mask.nonzero(as_tuple=True)  # once, not for every tensor: it waits for the device
        features = {
            name: value[rows] if self._by_position(name) and value.shape[:2] == shape else value
            for name, value in outputs.features.items()
        }
        return replace(outputs, logits=self._columns(net, outputs.logits[rows]), features=features)

    @property
    def chance(self) -> float:
        """The score of a network that finds all tokens equally probable."""
        return {"ppl": float(self.num_classes), "ce": math.log(self.num_classes), "acc": 1 / self.num_classes}[
            self.score
        ]

    def measures(self, words: int | None = None) -> TokenMeasures:
        """Build measures for one pass over a split of ``words`` words (None: not known, or no text of words)."""
        return TokenMeasures(words)

    def further(self, net: nn.Module, data: DataModule, split: str, device: torch.device) -> dict[str, float]:
        """Measure greedy answers to the questions of a split, and drawn ones where ``passes`` asks for it.

        ``em`` the share that ended and that the data call right (``em/<group>`` by group), ``ended`` the share that
        came to an end-of-text token, ``new_tokens`` the mean length, ``pass@k`` as in
        :func:`~kdlab.tasks.generation.pass_at_k`.
        Nothing where the split asks no questions.
        """
        text = cast(TextData, data)
        answers = self.generation.answers(net, text, split, device, self.num_classes)
        if answers is None:
            return {}
        drawn = self.generation.passed(net, text, split, device, self.num_classes)
        return {**answers.measures(), **self._texts(answers), **drawn}

    def samples(self, net: nn.Module, data: DataModule, split: str, device: torch.device, count: int = 4) -> str | None:
        """Generate samples by ``net`` as a table in Markdown: answers to questions, or continuations of text."""
        text = cast(TextData, data)
        answers = self.generation.answers(net, text, split, device, self.num_classes, count)
        if answers is not None:
            return answers.markdown()
        rows = open_ended(net, text, split, device, self.num_classes, self.generation, count)
        return table(("text", "goes on", "written"), rows) if rows else None

    def _texts(self, answers: Answers) -> dict[str, float]:
        """Compute further measures of the generated answers."""
        return {}

    def _by_position(self, layer: str) -> bool:
        """Return whether a layer's output has the positions of ``SequenceBatch.loss_mask``."""
        return True

    def _columns(self, net: nn.Module, logits: Any) -> Any:
        width = logits.shape[-1]
        if width < self.num_classes:
            raise UserError(
                "model",
                f"{type(net).__name__} has {width} outputs and the vocabulary {self.num_classes} ids",
                (
                    "a network for this vocabulary, or of a teacher with another one the teacher's "
                    "text instead of its probabilities (kdlab generate, then data=traces) or optimal "
                    "transport (loss=uld)"
                ),
            )
        if width > self.num_classes and net not in self._cut:
            self._cut.add(net)
            log.info(
                "%s: %d outputs, cut to the %d shared ids and renormalised", type(net).__name__, width, self.num_classes
            )
        return columns(logits, self.num_classes)


class TokenMeasures:
    r"""Measures of a student's next tokens, and of its agreement with a teacher, in one pass over a split.

    ``ce`` in nats a token, weighted as the rows are, ``ppl`` its exponential, ``acc`` the share of tokens that are the
    most probable ones; ``ce/reasoning``, ``ce/answer`` by segment where a split has several; ``ppl_word`` where the
    number of words is known,

    .. math:: \exp\Big(-\tfrac{1}{\mathrm{words}} \sum_t \log p(x_t \mid x_{<t})\Big),

    which compares between tokenizers. With a teacher also ``kl`` at temperature 1 and ``agreement``, the share of rows
    where both name the same token. Of a sparse teacher the divergence is that of its k ids and one bucket of all
    others, which is never more than the whole one, and is called ``kl_top<k>``. A teacher of sampled ids, or of other
    tokens than the student's, has neither.

    Only sums are kept, in float64, and of projected logits ``chunk`` rows exist at a time.

    Args:
        words: number of words of the split; None where it is not known.
        chunk: rows whose logits are made at once.
    """

    def __init__(self, words: int | None = None, chunk: int = 512) -> None:
        self.words, self.chunk = words, chunk
        self.rows = 0
        self._labelled: Tensor | None = None
        self._compared: Tensor | None = None
        self._divergence = "kl"

    @torch.no_grad()
    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Count one batch; rows without a label count for the comparison with the teacher alone."""
        self.rows += len(batch)
        others = None if teacher is None or isinstance(teacher.logits, Sampled) else teacher.logits
        if teacher is not None and "paired" in teacher.heads:  # its columns are other tokens
            others = None
        for start in range(0, len(batch), self.chunk):
            at = slice(start, start + self.chunk)
            part, logits = batch.part(at), dense(student.logits[at])
            first = logits.argmax(-1)
            weight = torch.ones_like(first, dtype=torch.float64) if part.weight is None else part.weight.double()
            self._count(logits, first, weight, part)
            if others is not None:
                self._compare(logits, first, weight, others[at])

    def _count(self, logits: Tensor, first: Tensor, weight: Tensor, part: Batch) -> None:
        if self._labelled is None:
            self._labelled = torch.zeros(len(SEGMENTS), 4, dtype=torch.float64, device=logits.device)
        known = part.segment if isinstance(part, SequenceBatch) else None
        segment = torch.full_like(first, SEGMENTS.index("text")) if known is None else known
        nats = cross_entropy(logits, part.targets).double()
        weight = weight * part.labelled
        right = (first == part.targets).double()
        self._labelled.index_add_(0, segment, torch.stack([weight, weight * nats, weight * right, nats], 1))

    def _compare(self, logits: Tensor, first: Tensor, weight: Tensor, teacher: object) -> None:
        student_logits, teacher_logits = align_logits(logits, teacher)
        if isinstance(teacher, Sparse):
            self._divergence = f"kl_top{teacher.ids.shape[-1]}"
            top = teacher.ids.gather(-1, teacher.log_probs.argmax(-1, keepdim=True))[:, 0].long()
        else:
            top = teacher_logits.argmax(-1)
        seen = torch.stack(
            [weight, weight * kl(student_logits, teacher_logits).double(), weight * (first == top)], 1
        ).sum(0)
        self._compared = seen if self._compared is None else self._compared + seen

    def compute(self) -> dict[str, float]:
        """Compute the measures over everything counted; nan where no row has a label."""
        empty = torch.zeros(len(SEGMENTS), 4, dtype=torch.float64)
        each = empty if self._labelled is None else self._labelled.cpu()
        weight, nats, right, plain = each.sum(0).tolist()
        ce = nats / weight if weight else math.nan
        measures = {"ce": ce, "ppl": _exp(ce), "acc": right / weight if weight else math.nan}
        if self.words:
            measures["ppl_word"] = _exp(plain / self.words)
        occurring = each[:, 0] > 0
        if occurring.sum() > 1:
            for name, occurs, (share, sum_, *_) in zip(SEGMENTS, occurring.tolist(), each.tolist(), strict=True):
                if occurs:
                    measures[f"ce/{name}"] = sum_ / share
        if self._compared is not None:
            share, divergence, same = self._compared.tolist()
            if share:
                measures |= {"agreement": same / share, self._divergence: divergence / share}
        return measures


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf if value == value else math.nan
