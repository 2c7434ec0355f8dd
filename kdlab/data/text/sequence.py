"""What a data set of text hands over: sequences of token ids, and the questions that some of them answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdlab.errors import UserError
from kdlab.functional.types import SEGMENTS

if TYPE_CHECKING:
    from kdlab.data.text.tokenizer import Tokenizer

PROMPT, REASONING, ANSWER, TEXT = range(len(SEGMENTS))
"""Segments of a token: the numbers that :attr:`Sequence.segments` holds, indices into ``SEGMENTS``."""


@dataclass
class Question:
    """Prompt that a network continues, and the right answer.

    Args:
        prompt: (n,) ids that the (decoder of the) network is given.
        answer: the right answer, as text.
        group: group that figures are also reported by (say, the number of steps); "" for none.
        text: the question as a person reads it.
        source: input of the encoder: (m,) ids or (F, m) features; None without an encoder.
    """

    prompt: Tensor
    answer: str
    group: str = ""
    text: str = ""
    source: Tensor | None = None


@dataclass
class Sequence:
    """One example: the token at each position, and the segment that each is part of.

    Args:
        ids: (n,) integer token ids; the network reads ``ids[:-1]`` and predicts ``ids[1:]``. With an encoder they
            begin with the decoder's start token.
        segments: (n,) index into ``SEGMENTS`` of each token itself.
        question: the question that this sequence answers, if any.
        source: input of the encoder: (m,) ids or (F, m) float features; None without an encoder.
        weight: weight of all its rows.
        running: running text, which is cut into windows of the context; any other sequence has to fit whole.
    """

    ids: Tensor
    segments: Tensor
    question: Question | None = None
    source: Tensor | None = None
    weight: float = 1.0
    running: bool = False

    @classmethod
    def of(cls, pieces: Iterable[tuple[list[int], int]], **options: object) -> Sequence:
        """Build a sequence of pieces, each of token ids and the segment they are part of.

        >>> Sequence.of([([5, 6], PROMPT), ([7], ANSWER)]).segments.tolist()
        [0, 0, 2]
        """
        pieces = list(pieces)
        ids = torch.tensor([token for piece, _ in pieces for token in piece], dtype=torch.int32)
        kinds = torch.tensor([kind for piece, kind in pieces for _ in piece], dtype=torch.uint8)
        return cls(ids, kinds, **options)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.ids)


def same_text(question: Question, text: str) -> bool:
    """Return whether a generated text is the answer, up to white space around it."""
    return text.strip() == question.answer.strip()


@dataclass
class RawText:
    """Data set of text, tokenised.

    Args:
        name: name of the data set.
        tokenizer: tokenizer of the ids.
        splits: sequences of ``train``, ``val``, ``test``, and possibly ``ood`` (another domain's test split).
        words: words per split, where perplexity per word makes sense.
        right: function that returns whether a generated text is the right answer to a question.
        source_length: every encoder input is padded to this length; None pads to the longest of a micro-batch.
        source_fill: value that features are padded with.
        key: the config key to name when the content is wrong.
    """

    name: str
    tokenizer: Tokenizer
    splits: dict[str, list[Sequence]]
    words: dict[str, int] = field(default_factory=dict)
    right: Callable[[Question, str], bool] = same_text
    source_length: int | None = None
    source_fill: float = 0.0
    key: str = "data"

    def check(self) -> RawText:
        """Return this source, if its sequences make sense.

        Raises:
            UserError: for an empty training split, ids out of range, unequal lengths, or sequences with an encoder
                input beside sequences without.
        """
        if not self.splits.get("train"):
            raise UserError(self.key, f"{self.name} (train) has no sequences")
        with_source = self.splits["train"][0].source is not None
        for split, sequences in self.splits.items():
            for number, one in enumerate(sequences):
                where = f"{self.name} ({split}), sequence {number}"
                if len(one.ids) != len(one.segments):
                    raise UserError(self.key, f"{where} has {len(one.ids)} tokens and {len(one.segments)} segments")
                if (one.source is not None) != with_source:
                    has = "no" if with_source else "an"
                    raise UserError(self.key, f"{where} has {has} encoder input, unlike the first one")
            ids = torch.cat([one.ids for one in sequences]) if sequences else torch.zeros(0)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.tokenizer.size:
                raise UserError(
                    self.key,
                    f"{self.name} ({split}) has token ids {int(ids.min())}..{int(ids.max())}",
                    f"0..{self.tokenizer.size - 1}, which its tokenizer has",
                )
        return self
