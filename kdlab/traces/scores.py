"""Log-probabilities of a teacher, moved onto the tokens that training will show.

An endpoint names tokens by their text. Training sees ids, of a sequence made by :mod:`kdlab.data.text.templates`:
another prompt, and reasoning and answer tokenised apart. Where the two agree token by token, the teacher's
distributions hold for the sequence of training too; where they do not, there are no rows, and nobody guesses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdlab.data.text.sequence import PROMPT
from kdlab.data.text.templates import TEMPLATE, Example, sequences
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.traces.reply import Scored

_NAMED = re.compile(rb"token_id:(\d+)")


@dataclass(frozen=True)
class Rows:
    """Rows that a token cache stores of one trace.

    Attributes:
        ids: (n,) int64 token ids of the sequence.
        positions: (m,) ascending positions: those that predict a token of reasoning, answer or end.
        classes: (m, k) ids, each once a row.
        log_probs: (m, k) natural logarithms; -inf where fewer than k are known.
    """

    ids: np.ndarray
    positions: np.ndarray
    classes: np.ndarray
    log_probs: np.ndarray


class Pieces:
    """Table of the bytes that every token of a tokenizer stands for.

    Args:
        tokenizer: tokenizer of the student: byte-level, SentencePiece-like (``▁`` and ``<0x0A>``) or of plain text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        described = json.loads(tokenizer.inner.to_str())
        decoder = json.dumps(described.get("decoder"))
        special = {token["content"] for token in described.get("added_tokens", [])}
        byte_of = _byte_level() if '"ByteLevel"' in decoder else None
        metaspace = "▁" in decoder
        self.bytes: list[bytes] = [b""] * tokenizer.size
        for token, number in tokenizer.vocabulary().items():
            if token in special:
                self.bytes[number] = token.encode()
            elif byte_of is not None and all(sign in byte_of for sign in token):
                self.bytes[number] = bytes(byte_of[sign] for sign in token)
            elif metaspace and (raw := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
                self.bytes[number] = bytes([int(raw[1], 16)])
            else:
                self.bytes[number] = (token.replace("▁", " ") if metaspace else token).encode()
        self._ids = {piece: number for number, piece in reversed(list(enumerate(self.bytes)))}

    def find(self, piece: bytes, before: bytes = b"") -> int | None:
        """Return the id of ``before`` and a piece together, or None; ``token_id:N`` names its id itself."""
        if (named := _NAMED.fullmatch(piece)) is not None:
            number = int(named[1])
            if number >= len(self.bytes):
                return None
            return number if not before else self._ids.get(before + self.bytes[number])
        return self._ids.get(before + piece)

    def text(self, piece: bytes) -> bytes:
        """Return the bytes of a piece."""
        number = self.find(piece) if _NAMED.fullmatch(piece) else None
        return piece if number is None else self.bytes[number]


def _byte_level() -> dict[str, int]:
    """Return a map of sign → byte of byte-level vocabularies (Radford et al., 2019).

    Latin-1 where visible, the others in turn from U+0100 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def align(
    scores: Sequence[Scored], pieces: Pieces, question: str, reasoning: str, answer: str, k: int, ended: bool
) -> Rows | None:
    """Return rows for the sequence that training makes of a trace in the form ``steps``; None if its tokens differ.

    The first token may lack the space that stands before it in training: its candidates then get it. The end of a text
    that an endpoint ended, without a distribution for it, has all mass on the end token.

    Args:
        scores: scores of the teacher, a row for each token it wrote.
        pieces: pieces of the student's tokenizer.
        question: question of the trace.
        reasoning: reasoning of the trace.
        answer: answer of the trace.
        k: number of classes to keep.
        ended: whether the teacher stopped by itself.
    """
    example = Example(question, reasoning, answer)
    made = sequences([example], pieces.tokenizer)
    if not made:
        return None
    ids, segments = made[0].ids.numpy().astype(np.int64), made[0].segments.numpy()
    first = int((segments == PROMPT).sum())
    wanted, eos = ids[first:-1].tolist(), int(ids[-1])
    if len(scores) < len(wanted):
        return None
    gap = TEMPLATE.gap.encode()
    before = b"" if pieces.find(scores[0].piece) == wanted[0] else gap
    for place, token in enumerate(wanted):
        if pieces.find(scores[place].piece, b"" if place else before) != token:
            return None
    rows = [_row(scores[i], pieces, k, b"" if i else before) for i in range(len(wanted))]
    rest = scores[len(wanted) :]
    if rest and pieces.find(rest[0].piece) == eos:
        rows.append(_row(rest[0], pieces, k, b""))
    elif ended and not b"".join(pieces.text(score.piece) for score in rest).strip():
        rows.append({eos: 0.0})
    else:
        return None
    classes, log_probs = np.zeros((len(rows), k), np.int64), np.full((len(rows), k), -np.inf)
    for i, row in enumerate(rows):
        unused = (n for n in range(len(pieces.bytes)) if n not in row)
        names = [*row, *(next(unused) for _ in range(k - len(row)))]
        classes[i] = names
        log_probs[i, : len(row)] = np.minimum(list(row.values()), 0.0) if row else []
    return Rows(ids, np.arange(first - 1, len(ids) - 1), classes, log_probs)


def _row(score: Scored, pieces: Pieces, k: int, before: bytes) -> dict[int, float]:
    """Return id → log-probability of the k most probable pieces that are tokens; the rest belongs to the tail."""
    row: dict[int, float] = {}
    for piece, value in score.top:
        number = pieces.find(piece, before)
        if number is not None and number not in row and len(row) < k:
            row[number] = value
    return row
