"""Data sets of text: tokenizers, sequences, how they are batched, and where they come from."""

from kdlab.data.text.build import TextCommon, text_data
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import ANSWER, PROMPT, REASONING, TEXT, Question, RawText, Sequence
from kdlab.data.text.tokenizer import Tokenizer

__all__ = [
    "ANSWER",
    "PROMPT",
    "REASONING",
    "TEXT",
    "Question",
    "RawText",
    "Sequence",
    "TextCommon",
    "TextData",
    "Tokenizer",
    "text_data",
]
