"""Text to text: an encoder reads a source (text or sound), a decoder writes what is wanted of it."""

from __future__ import annotations

from typing import Any

from torchmetrics.functional.text import char_error_rate, word_error_rate

from kdlab.functional.types import Target
from kdlab.tasks.generation import Answers
from kdlab.tasks.language import LanguageModeling


class TextToText(LanguageModeling):
    """Next tokens of an encoder-decoder; ``SequenceBatch.loss_mask`` is about the decoder's positions.

    Layers inside an encoder keep their own positions, (B, S, d): a source has no rows.

    Args:
        vocab_size: ids of the tokenizer.
        transcripts: take the answers for transcripts, which are also measured by ``wer`` and ``cer``: the edits
            (substituted, left out, put in) that turn what was written into the reference, in words and in characters,
            over the length of the references. They are above 1 where much more was written than said.
        options: options of :class:`~kdlab.tasks.LanguageModeling`.
    """

    target: Target = "text"

    def __init__(self, vocab_size: int, transcripts: bool = False, **options: Any) -> None:
        super().__init__(vocab_size, **options)
        self.transcripts = transcripts

    def _texts(self, answers: Answers) -> dict[str, float]:
        wanted = [question.answer.strip() for question in answers.questions]
        if not self.transcripts or not any(wanted):
            return {}
        written = [text.strip() for text in answers.texts]
        return {"wer": float(word_error_rate(written, wanted)), "cer": float(char_error_rate(written, wanted))}

    def _by_position(self, layer: str) -> bool:
        return "encoder" not in layer.split(".")
