"""Pairs of texts of one's own: what the encoder reads, and what the decoder is to write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import torch

from kdlab.data.rng import permutation
from kdlab.data.splits import rows_of
from kdlab.data.text.combine import TextCommon, text_data
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import ANSWER, PROMPT, Question, Sequence, TextSource
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError
from kdlab.files import Unreadable, open_text

Pair = tuple[str, str]


def pairs(
    path: str | None = None,
    val_path: str | None = None,
    test_path: str | None = None,
    source: str = "source",
    target: str = "target",
    prefix: str = "",
    val: int | float | None = None,
    test: int | float | None = None,
    **common: Unpack[TextCommon],
) -> TextData:
    """Text-to-text pairs from JSON lines or a table.

    A ``.jsonl`` file has one object a line; any other file is a table of columns that tabs separate, with a header
    that names them, or of just source and target without one. The encoder reads the source and an end token; the
    decoder starts from the end token.

    Args:
        path: the training file.
        val_path, test_path: files of the other splits.
        source, target: the keys (or columns) of the two texts.
        prefix: put before every source, as T5 wants it (``"translate English to German: "``).
        val, test: pairs (a number, or a share) taken from the training file where a split has no file of its own;
            None is a tenth; 0 is none.

    The other arguments are :class:`TextData`'s; ``context`` limits the target, not the source.

    Raises:
        UserError: naming the file and line that is no pair.
    """
    if path is None:
        raise UserError(f"data.path: null; accepted: a .jsonl file, or a table of {source} and {target}")
    seed = common.get("split_seed", 0)
    found = {"train": _read(path, source, target, "data.path")}
    for split, own, amount in (("test", test_path, test), ("val", val_path, val)):
        if own is None:
            found["train"], found[split] = _split_off(found["train"], amount, seed, split)
        elif amount:
            raise UserError(f"data.{split}: {amount} beside data.{split}_path; accepted: one of the two")
        else:
            found[split] = _read(own, source, target, f"data.{split}_path")
    name = Path(path).name

    def read(tokenizer: Tokenizer) -> TextSource:
        splits = {
            split: [_sequence(tokenizer, prefix + one, other) for one, other in some]
            for split, some in found.items()
            if some
        }
        words = {split: sum(len(other.split()) for _, other in some) for split, some in found.items() if some}
        return TextSource(name, tokenizer, splits, words)

    return text_data(read, lambda: (prefix + text for pair in found["train"] for text in pair), alphabet=None, **common)


def _sequence(tokenizer: Tokenizer, source: str, target: str) -> Sequence:
    start, end = [tokenizer.eos_id], [tokenizer.eos_id]
    encoder = torch.tensor([*tokenizer.encode(source), *end], dtype=torch.int32)
    question = Question(torch.tensor(start, dtype=torch.int32), target, text=source, source=encoder)
    return Sequence.of(
        [(start, PROMPT), ([*tokenizer.encode(target), *end], ANSWER)], question=question, source=encoder
    )


def _split_off(train: list[Pair], amount: int | float | None, seed: int, split: str) -> tuple[list[Pair], list[Pair]]:
    count = rows_of(0.1 if amount is None else amount, len(train), f"data.{split}")
    chosen = set(permutation(len(train), seed, "split", split)[:count].tolist())
    return (
        [pair for number, pair in enumerate(train) if number not in chosen],
        [train[number] for number in sorted(chosen)],
    )


def _read(path: str, source: str, target: str, key: str) -> list[Pair]:
    file = Path(path).expanduser()
    try:
        with open_text(file) as opened:
            text = opened.read().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is no UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{key}: cannot read {path} ({error.strerror}); accepted: a .jsonl file or a table") from None
    except Unreadable as error:
        raise UserError(f"{key}: cannot read {path} ({error}); accepted: a .jsonl file or a table") from None
    # split("\n"), since str.splitlines also breaks at characters that JSON allows inside of a text
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{key}: {path} is empty; accepted: lines of {source} and {target}")
    form = _objects if file.suffix in (".jsonl", ".json", ".ndjson") else _columns
    found = []
    for number, one, other in form(lines, source, target, f"{key}: {path}"):
        if not (isinstance(one, str) and isinstance(other, str)):
            raise UserError(f"{key}: {path}, line {number}: {source} and {target} must be texts")
        found.append((one, other))
    if not found:
        raise UserError(f"{key}: {path} has a header and no pairs")
    return found


def _objects(
    lines: list[tuple[int, str]], source: str, target: str, where: str
) -> Iterator[tuple[int, object, object]]:
    for number, line in lines:
        try:
            held = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, line {number} is no JSON ({error}); accepted: one object a line") from None
        if not isinstance(held, dict) or source not in held or target not in held:
            has = ", ".join(held) if isinstance(held, dict) else f"a {type(held).__name__}"
            raise UserError(f"{where}, line {number}: {has or 'nothing'}; accepted: {source!r} and {target!r}")
        yield number, held[source], held[target]


def _columns(lines: list[tuple[int, str]], source: str, target: str, where: str) -> Iterator[tuple[int, str, str]]:
    header = lines[0][1].split("\t")
    named = source in header and target in header
    width = len(header) if named else 2
    first, second = (header.index(source), header.index(target)) if named else (0, 1)
    for number, line in lines[named:]:
        cells = line.split("\t")
        if len(cells) != width:
            wanted = "columns as in the header" if named else f"source and target, or a header with {source}, {target}"
            raise UserError(f"{where}, line {number}: {len(cells)} columns; accepted: {width}, {wanted}")
        yield number, cells[first], cells[second]
