"""What a network writes: answers to questions, judged; text that goes on; and how fast."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, comb
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from kdlab.data import DataModule, TextData
from kdlab.errors import UserError
from kdlab.functional import SequenceBatch
from kdlab.functional.rng import Draws, fold, permutation, seed_of
from kdlab.models.transformers.generation import encoder_rows, generate
from kdlab.ranges import positive, share, whole_number

_RUNNING = 64
"""Number of tokens by which running text is continued, unless configured."""
_ROOM = 1.5
"""Factor by which an answer may be longer than the longest reference, unless configured."""


@dataclass(frozen=True)
class Generation:
    """Settings of generation; :class:`~kdlab.tasks.LanguageModeling` says what the arguments mean."""

    new_tokens: int | None = None
    max_questions: int | None = None
    at_once: int = 64
    passes: tuple[int, ...] = ()
    samples: int | None = None
    temperature: float = 0.8
    top_p: float = 1.0
    prompt: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("new_tokens", "max_questions", "at_once", "samples", "prompt"):
            value = getattr(self, name)
            if value is None and name in ("new_tokens", "max_questions", "samples"):
                continue
            whole_number(f"task.{name}", value)
        if any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in self.passes):
            raise UserError("task.passes", f"{list(self.passes)}", "whole numbers, at least 1, such as [1, 4]")
        if self.passes and self.samples is not None and self.samples < max(self.passes):
            raise UserError(
                "task.samples", f"{self.samples} for pass@{max(self.passes)}", f"at least {max(self.passes)}"
            )
        positive("task.temperature", self.temperature)
        share("task.top_p", self.top_p, zero=False)

    def answers(
        self, net: nn.Module, data: TextData, split: str, device: object, width: int, count: int | None = None
    ) -> Answers | None:
        """Generate greedy answers to the questions of a split, or to ``count`` of them; None where it asks none."""
        asked = self._asked(data, split, count)
        if not asked:
            return None
        questions = [question for _, question in asked]
        return Answers.of(questions, self._write(net, data, split, questions, device, width), data)

    def passed(self, net: nn.Module, data: TextData, split: str, device: Any, width: int) -> dict[str, float]:
        """Compute pass@k for each k of ``passes``, with answers that depend on (seed, question, sample, position)."""
        if not self.passes:
            return {}
        asked, total = self._asked(data, split), self.samples or max(self.passes)
        right = dict.fromkeys((number for number, _ in asked), 0)
        pairs = [(number, question, sample) for number, question in asked for sample in range(total)]
        numbers = torch.tensor([[number, sample] for number, _, sample in pairs])
        draws = Draws(fold(fold(seed_of(self.seed, "answers"), numbers[:, 0]), numbers[:, 1]).to(device))
        questions = [question for _, question, _ in pairs]
        texts = Answers.of(questions, self._write(net, data, split, questions, device, width, draws), data)
        for (number, *_), good in zip(pairs, texts.right, strict=True):
            right[number] += good
        return {f"pass@{k}": fmean(pass_at_k(total, good, k) for good in right.values()) for k in self.passes}

    def _asked(self, data: TextData, split: str, count: int | None = None) -> list[tuple[int, Any]]:
        """Return the questions that are asked, with their numbers in the split."""
        questions = list(data.questions(split)) if data.has_questions else []
        most = min(n for n in (len(questions), self.max_questions, count) if n is not None)
        # drawn, not the first ones: a split may be sorted, by its groups say
        chosen = permutation(len(questions), "questions")[:most].sort().values.tolist()
        return [(number, questions[number]) for number in chosen]

    def _longest(self, data: TextData, split: str) -> int:
        """Return the greatest length of an answer in tokens: as configured, or by the references of train and split."""
        if self.new_tokens is not None:
            return self.new_tokens
        known = [data.longest(name) for name in ("train", split)] if hasattr(data, "longest") else []
        longest = max((length for length in known if length is not None), default=data.context)
        return ceil(_ROOM * longest)

    def _write(
        self,
        net: nn.Module,
        data: TextData,
        split: str,
        questions: Sequence[Any],
        device: Any,
        width: int,
        draws: Draws | None = None,
    ) -> list[Tensor]:
        texts: list[Tensor] = []
        new_tokens = self._longest(data, split)
        for start in range(0, len(questions), self.at_once):
            at = slice(start, start + self.at_once)
            some = questions[at]
            with_source = some[0].source is not None
            texts += generate(
                net,
                [question.prompt.to(device, torch.int64) for question in some],
                new_tokens=new_tokens,
                context=data.context,
                eos_id=data.tokenizer.eos_id,
                pad_id=data.tokenizer.pad_id,
                vocab_size=width,
                temperature=self.temperature if draws is not None else 0.0,
                top_p=self.top_p,
                uniform=None if draws is None else draws.rows(at).uniform,
                source=[_padded(question.source, data).to(device) for question in some] if with_source else None,
            )
        return texts


@dataclass
class Answers:
    """Generated answers to some questions; a text that came to no end is no answer, and so never right."""

    questions: list[Any]
    texts: list[str]
    right: list[bool]
    ended: list[bool]
    lengths: list[int]

    @classmethod
    def of(cls, questions: list[Any], ids: Iterable[Tensor], data: TextData) -> Answers:
        """Read continuations ``ids`` and let the data say which are right.

        One that ran out of room is wrong: a number that is cut off may happen to be the right one.
        """
        eos, texts, ended, lengths = data.tokenizer.eos_id, [], [], []
        for tokens in (one.tolist() for one in ids):
            ended.append(eos in tokens)
            lengths.append(len(tokens))
            texts.append(data.tokenizer.decode([token for token in tokens if token != eos]))
        judged = zip(questions, texts, ended, strict=True)
        right = [bool(data.right(question, text)) and whole for question, text, whole in judged]
        return cls(questions, texts, right, ended, lengths)

    def measures(self) -> dict[str, float]:
        """Compute ``em``, ``em/<group>``, ``ended`` and ``new_tokens`` as means over the questions."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for question, good in zip(self.questions, self.right, strict=True):
            if question.group:
                groups[question.group].append(good)
        return {
            "em": fmean(self.right),
            **{f"em/{name}": fmean(groups[name]) for name in sorted(groups, key=_numbers_first)},
            "ended": fmean(self.ended),
            "new_tokens": fmean(self.lengths),
        }

    def markdown(self) -> str:
        """Format a table of question, right answer, generated answer, and whether it is right."""
        rows = [
            (question.text, question.answer, text, "yes" if good else "no")
            for question, text, good in zip(self.questions, self.texts, self.right, strict=True)
        ]
        return table(("question", "answer", "written", "right"), rows)


def pass_at_k(samples: int, right: int, k: int) -> float:
    r"""Estimate without bias the chance that at least one of ``k`` samples is right, from ``samples`` >= k of them.

    .. math:: 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    Chen et al., *Evaluating Large Language Models Trained on Code*, 2021.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"samples, right, k: {samples}, {right}, {k}; accepted: 1 <= k <= samples, right <= samples")
    return 1 - comb(samples - right, k) / comb(samples, k)


def open_ended(
    net: nn.Module, data: TextData, split: str, device: Any, width: int, how: Generation, count: int
) -> list[tuple[str, ...]]:
    """Return (beginning, reference, greedy continuation by ``net``) of some sequences of a split's first batch."""
    batch = next(iter(data.ordered_loader(split)), None)
    if batch is None or "input_ids" not in batch.inputs or "decoder_input_ids" in batch.inputs:
        return []
    assert isinstance(batch.inputs, dict) and isinstance(batch, SequenceBatch)
    ids, ends = batch.inputs["input_ids"], _lengths(batch.loss_mask)
    usable = [row for row, end in enumerate(ends) if end > how.prompt]
    chosen = usable[:: max(1, len(usable) // count)][:count]
    if not chosen:
        return []
    tokenizer, new_tokens = data.tokenizer, how.new_tokens or _RUNNING
    texts = generate(
        net,
        [ids[row, : how.prompt].to(device, torch.int64) for row in chosen],
        new_tokens=new_tokens,
        context=data.context,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        vocab_size=width,
    )
    rest = [ids[row, how.prompt : min(ends[row], how.prompt + new_tokens)] for row in chosen]
    return [
        (
            tokenizer.decode(ids[row, : how.prompt].tolist()),
            tokenizer.decode(on.tolist()),
            tokenizer.decode(own.tolist()),
        )
        for row, on, own in zip(chosen, rest, texts, strict=True)
    ]


def tokens_per_second(
    net: nn.Module,
    data: DataModule,
    prompt: int = 16,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the tokens a second that ``net`` generates: greedily, one sequence, on one CPU thread; the median.

    Args:
        net: a language model, on the device that is measured.
        data: data that set the vocabulary and context, and whose first example an encoder reads.
        prompt: tokens that are read first, half the context at most; their reading is part of the time.
        new_tokens: tokens that are written, as far as the context reaches; end-of-text does not end them.
        repeats: number of measurements, after one that is not counted.
        clock: function that returns the time in seconds.
    """
    device = next(net.parameters()).device
    prompt = min(prompt, max(1, data.context // 2))
    new_tokens = min(new_tokens, data.context + 1 - prompt)
    source = _first_source(data, device)
    start = torch.arange(prompt, device=device) % data.vocab_size
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(repeats + 1):
            begin = clock()
            texts = generate(
                net,
                [start],
                new_tokens=new_tokens,
                context=data.context,
                eos_id=None,
                pad_id=0,
                vocab_size=data.vocab_size,
                source=source,
            )
            texts[0].tolist()  # waits for the device
            seconds.append(clock() - begin)
    finally:
        torch.set_num_threads(threads)
    return new_tokens / median(seconds[1:])


def _padded(source: Tensor, data: DataModule) -> Tensor:
    """Pad features (F, m) to the length that batches have; ids stay as they are, since a mask tells where they end."""
    if not source.is_floating_point():
        return source
    return nn.functional.pad(source, (0, data.network_kwargs["frames"] - source.shape[1]))


def _first_source(data: DataModule, device: object) -> list[Tensor] | None:
    """Return the encoder's input of the first example of a split; None where there is no encoder."""
    split = "test" if data.counts["test"] else "train"
    batch = next(iter(data.ordered_loader(split, batch_size=1))).to(device)
    return encoder_rows(batch.inputs, [0])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Format a table in Markdown; the cells' own bars, line ends and markup are shown as they are.

    >>> print(table(("a", "b"), [("1|2", "x")]))
    | a | b |
    | --- | --- |
    | 1\|2 | x |
    """
    lines = [list(head), ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "`", "#"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\r", "").replace("\n", "<br>")


def _lengths(where: Tensor) -> list[int]:
    """Return the end of the rows of each sequence: one past the last position that counts."""
    return [int(row.nonzero()[-1]) + 1 if row.any() else 0 for row in where]


def _numbers_first(name: str) -> tuple[bool, float, str]:
    return (False, float(name), name) if name.isdecimal() else (True, 0.0, name)
