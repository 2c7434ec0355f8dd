"""TextData: the one interface of every data set of text."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from kdlab.data.contract import DataModule, Modality
from kdlab.data.order import Order
from kdlab.data.text.loader import Reading, TextLoader
from kdlab.data.text.sequence import Question, RawText, Sequence
from kdlab.data.text.token_store import Flat, flatten
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError, unknown
from kdlab.functional.rng import permutation
from kdlab.functional.types import SEGMENTS
from kdlab.ranges import whole_number

SEGMENT_WEIGHTS = {"prompt": 0.0, "reasoning": 1.0, "answer": 1.0, "text": 1.0}
"""Weight of a predicted token, by the segment that it is part of."""

Read = Callable[[Tokenizer], RawText]
Texts = Callable[[], Iterable[str]]

log = logging.getLogger(__name__)


class TextData(DataModule):
    """Sequences of tokens for training, validation and test, ready to be shown.

    An example is one window of running text, or one sequence that stands for itself. Batches carry (example, 0) as
    ``key``; their rows are the positions whose prediction counts.

    Args:
        source: content of the data set.
        context: positions that a network reads at once. Running text is cut into windows of ``context + 1`` tokens
            which overlap by one, so that every token but the first is predicted once.
        batch_size: sequences of ONE optimizer step, over all its micro-batches and processes.
        eval_batch_size: sequences of a batch in evaluation; None is ``batch_size``.
        segment_weights: weight of a predicted token by the segment that it is part of; what is left out keeps
            ``SEGMENT_WEIGHTS``. A token that weighs nothing is no row.
        pack: show training sequences one after the other in rows of up to ``context`` positions, instead of one a row.
        fraction: train on this share of the training examples only.
        drop_long: leave out training sequences that do not fit into the context, instead of refusing them.
        eval_stride: distance in tokens between the starts of windows of running text in evaluation, where only what is
            new in a window counts: a token then has at least ``context - eval_stride`` before it (Baevski & Auli, ICLR
            2019). None is ``context``: no overlap.
        seed: seed of the order of examples.
        split_seed: seed of the choice of the fraction.

    Attributes:
        name, tokenizer, vocab_size, context, batch_size,
        counts ({train, labelled (= train), val, test, ood}),
        views (1: an example is always shown the same way), uncacheable_reason (None), transform.

    Raises:
        UserError: for any argument that does not fit the data.
    """

    read: Read | None = None
    texts: Texts
    alphabet: Texts
    kind = "text"
    has_questions = True

    def __init__(
        self,
        source: RawText,
        *,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        segment_weights: dict[str, float] | None = None,
        pack: bool = False,
        fraction: float | None = None,
        drop_long: bool = False,
        eval_stride: int | None = None,
        seed: int | None = None,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        source = source.check()
        self.name, self.tokenizer, self.vocab_size = source.name, source.tokenizer, source.tokenizer.size
        self.seed, self.pack, self._source = seed or 0, pack, source
        self.context = whole_number("data.context", context, 1)
        self.batch_size = whole_number("data.batch_size", batch_size, 1)
        self.eval_batch_size = whole_number(
            "data.eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1
        )
        stride = whole_number("data.eval_stride", self.context if eval_stride is None else eval_stride, 1)
        if stride > self.context:
            raise UserError("data.eval_stride", stride, f"1..{self.context} (data.context), or null")
        if fraction is not None and (isinstance(fraction, bool) or not 0 < fraction <= 1):
            raise UserError("data.fraction", f"{fraction!r}", "above 0, up to 1, or null")
        self.target = "next_token" if source.splits["train"][0].source is None else "text"
        if pack and self.target == "text":
            raise UserError("data.pack", f"true; {source.name} has encoder inputs, which are not packed", "false")
        self._reading = Reading(
            _weights(segment_weights),
            self.tokenizer.pad_id,
            self.context,
            source.source_length,
            source.source_fill,
        )
        self._flat: dict[str, Flat] = {}
        self._questions: dict[str, list[Question]] = {}
        for split in source.splits:
            self._fill(split, source.splits[split], stride, drop_long, fraction, split_seed)
        self.counts = {split: len(self._flat.get(split, ())) for split in ("train", "val", "test", "ood")}
        self.counts["labelled"] = self.counts["train"]
        self.to("cpu")

    def _fill(
        self,
        split: str,
        sequences: list[Sequence],
        stride: int,
        drop_long: bool,
        fraction: float | None,
        split_seed: int,
    ) -> None:
        """Lay the sequences of a split end to end, and keep what trains or is measured."""
        key, train = self._source.key, split == "train"
        long = [len(one) - 1 for one in sequences if not one.running and len(one) - 1 > self.context]
        if long and not (train and drop_long):
            hint = " or data.drop_long=true to leave them out" if train else ""
            raise UserError(
                "data.context",
                (f"{self.context}; {len(long)} of {len(sequences)} {split} sequences of {self.name} are longer"),
                f"at least {max(long)}{hint}",
            )
        if long:
            log.warning("%d of %d training sequences are longer than the context: left out", len(long), len(sequences))
            sequences = [one for one in sequences if one.running or len(one) - 1 <= self.context]
        flat, origin = flatten(sequences, self.context, self.context if train else stride)
        counted = flat.sums(self._reading.weights)[1] > 0
        if len(flat) and not counted.any():
            raise UserError(
                key,
                f"no token of {self.name} ({split}) counts",
                "data.segment_weights above 0 for a segment that it has",
            )
        if train and not len(flat):
            raise UserError(key, f"{self.name} (train) has no sequence that can be trained on")
        chosen = counted.nonzero()[:, 0]
        if train and fraction is not None:
            keep = permutation(len(chosen), split_seed, "split", "fraction")[: max(1, round(fraction * len(chosen)))]
            chosen = chosen[keep.sort().values]
        self._flat[split] = flat.take(chosen)
        used = set(origin[chosen].tolist()) if train else range(len(sequences))
        self._questions[split] = [
            one.question for number, one in enumerate(sequences) if one.question is not None and number in used
        ]

    # ---- what is in the splits

    def source(self, tokenizer: Tokenizer) -> RawText:
        """Return the content of the data set under another tokenizer."""
        assert self.read is not None
        return self.read(tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the sequences and questions of all splits, the tokenizer, and how much each segment counts."""
        total = hashlib.sha256(repr((sorted(self._flat), self.tokenizer.fingerprint)).encode())
        total.update(self._reading.weights.double().numpy().data)
        for split in sorted(self._flat):
            for name, tensor in self._flat[split].tensors():
                total.update(f"{split} {name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                total.update(tensor.contiguous().numpy().data)
            for question in self._questions[split]:
                total.update(repr((question.prompt.tolist(), question.answer, question.group)).encode())
        return total.hexdigest()

    def describe(self) -> str:
        """Return one line on the number of sequences and tokens that training sees."""
        return f"{self.counts['train']} sequences of {self.name} ({self.rows('train')} tokens to predict)"

    def rows(self, split: str) -> int:
        """Count the tokens of a split that are to be predicted and have a weight."""
        return int(self._flat[split].sums(self._reading.weights)[1].sum())

    def questions(self, split: str) -> list[Question]:
        """Return the questions of a split, in its order; none where the text asks nothing."""
        self._known(split)
        return self._questions.get(split, [])

    def right(self, question: Question, text: str) -> bool:
        """Return whether a generated text is the right answer."""
        return self._source.right(question, text)

    def longest(self, split: str = "train") -> int | None:
        """Return the length in tokens of the longest reference that ends in an answer; None without any.

        Reasoning and end of text count, as a network writes them too.
        """
        self._known(split)
        if split not in self._flat:
            return None
        flat = self._flat[split]
        answer, written = (flat.sums(torch.tensor(kinds))[1] for kinds in ([0, 0, 1, 0], [0, 1, 1, 0]))
        lengths = written[answer > 0]
        return int(lengths.max()) if len(lengths) else None

    def words(self, split: str) -> int | None:
        """Return the number of words of a split, where perplexity per word makes sense."""
        return self._source.words.get(split)

    @property
    @override
    def modality(self) -> Modality:  # type: ignore[override]
        first = self._source.splits["train"][0].source
        return "audio" if first is not None and first.is_floating_point() else "text"

    @override
    def check_reads(self, net: nn.Module, key: str) -> None:
        limit = getattr(net, "context", None)
        if isinstance(limit, int) and limit < self.context:
            raise UserError(f"{key}.context", f"{limit}, and data.context is {self.context}", "null, or at least that")
        takes = inspect.signature(net.forward).parameters
        name, pairs = type(net).__name__, "decoder_input_ids" in takes
        if pairs and self.target == "next_token":
            raise UserError(key, f"{name} takes pairs, and data ({self.name}) gives sequences", "such as gpt_tiny")
        if "input_ids" in takes and not pairs and self.target == "text":
            raise UserError(key, f"{name} takes sequences, and data ({self.name}) gives pairs", "an encoder-decoder")

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """Arguments that a network's constructor may take from the data."""
        known = {
            "vocab_size": self.vocab_size,
            "context": self.context,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id,
        }
        first = self._source.splits["train"][0].source
        if first is not None and first.is_floating_point():
            known |= {"mels": first.shape[0], "frames": self._source.source_length or first.shape[1]}
        return known

    def check_same_classes(self, other: Any) -> None:
        """Refuse a teacher's data of another tokenizer: logits of the same column would mean different tokens.

        Raises:
            UserError: naming both.
        """
        if not isinstance(other, TextData):
            raise UserError("teacher.data", f"{_what(other)} is {other.kind}", f"text, as data ({self.name}) is")
        self.same_tokens(other.tokenizer, "teacher.data")

    def same_tokens(self, other: Tokenizer, key: str) -> None:
        """Refuse another tokenizer: logits of the same column would mean different tokens.

        Raises:
            UserError: naming ``key``, both tokenizers, and what unlike ones can do.
        """
        if self.tokenizer.fingerprint == other.fingerprint:
            return
        own_tokens, other_tokens = self.tokenizer.vocabulary(), other.vocabulary()
        raise UserError(
            key,
            (
                f"its tokenizer ({other.size} tokens) is not that of data ({self.vocab_size} "
                f"tokens; {len(own_tokens.items() ^ other_tokens.items())} entries differ)"
            ),
            (
                "the same data.tokenizer (a file, or made of the same texts), the teacher's "
                "text instead of its probabilities (kdlab generate, then data=traces), or loss=uld"
            ),
        )

    def inference_metadata(self, folder: Path) -> dict[str, Any]:
        """Return the metadata that a run folder needs to read inputs and outputs again; save the tokenizer in it."""
        path = self.tokenizer.save(folder)
        return {"tokenizer": path.name, **self.network_kwargs}

    # ---- loaders

    @override
    def _forget_device(self) -> None:
        self._there: dict[str, Flat] = {}

    @override
    def _training_loader(self, parts: int) -> TextLoader:
        none = torch.zeros(self.counts["train"], dtype=torch.long)
        order = Order(none, self.batch_size, seed=self.seed, parts=parts, least=1)
        accumulate = self._place["accumulate"]
        return self._loader("train", self.batch_size, order=order, pack=self.pack, accumulate=accumulate)

    @override
    def _evaluation_loader(self, split: str) -> TextLoader:
        return self._loader(split, self.eval_batch_size)

    def ordered_loader(
        self, split: str = "train", view: int | None = None, batch_size: int | None = None
    ) -> TextLoader:
        """Return all examples of a split, in order and one a row, in this process: to fill a cache, or to predict.

        Args:
            split: ``train``, ``val``, ``test`` or ``ood``.
            view: number of the view, 0 or None: there is one.
            batch_size: sequences of a batch; None is ``eval_batch_size``.

        Raises:
            UserError: if there is no such split, or no such view.
        """
        self._known(split)
        if not self.counts[split]:
            raise UserError("split", f"{split}; {self.name} has no {split} sequences here")
        if view not in (None, 0):
            raise UserError("view", view, "0, the only view of text")
        return self._loader(split, batch_size or self.eval_batch_size, rank=0, world=1)

    def _known(self, split: str) -> None:
        if split not in self.counts or split == "labelled":
            raise unknown("split", split, [name for name in self.counts if name != "labelled"], "split")

    def _loader(self, split: str, batch_size: int, **options: Any) -> TextLoader:
        options = self._where(options)
        if split not in self._there:
            self._there[split] = self._flat[split].to(self._place["device"])
        return TextLoader(self._there[split], self._reading, batch_size, **options)


def _weights(given: dict[str, float] | None) -> Tensor:
    """Return the weight of each segment, (4,) float64."""
    weights = dict(SEGMENT_WEIGHTS)
    for segment, weight in dict(given or {}).items():
        if segment not in weights:
            raise unknown("data.segment_weights", segment, SEGMENTS, "segment")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"data.segment_weights.{segment}", f"{weight!r}", "a number from 0 on")
        weights[segment] = float(weight)
    if not any(weights.values()):
        raise UserError("data.segment_weights", "all are 0", "at least one segment above 0")
    return torch.tensor([weights[segment] for segment in SEGMENTS], dtype=torch.float64)


def _what(value: Any) -> str:
    return str(getattr(value, "name", None) or type(value).__name__)
