"""Pairs of texts of one's own: what the encoder reads, and what the decoder is to write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Unpack

import torch

from kdlab.data.splits import rows_of
from kdlab.data.text.build import TextCommon, text_data
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import ANSWER, PROMPT, Question, RawText, Sequence
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError, misspelt, nearest, unknown
from kdlab.functional.rng import permutation
from kdlab.system.files import Unreadable, open_text


class Pair(NamedTuple):
    """Source, its target, and the line of the file that they are on."""

    source: str
    target: str
    line: int


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
    """Load text-to-text pairs from JSON lines or a table.

    A ``.jsonl`` file has one object a line; any other file is a table of columns that tabs separate, with a header
    that names them, or of just source and target without one. The encoder reads the source and an end token; the
    decoder starts from the end token.

    No source stands in two splits, up to white space: pairs of one source go to the same split, and files of their own
    that share a source with another split are refused.

    Args:
        path: the training file.
        val_path: files of the other splits.
        test_path: see ``val_path``.
        source: the keys (or columns) of the two texts.
        target: see ``source``.
        prefix: put before every source, as T5 wants it (``"translate English to German: "``).
        val: pairs (a number, or a share) taken from the training file where a split has no file of its own, as
            near as pairs of one source allow; None is a tenth; 0 is none.
        test: see ``val``.

    The other arguments are :class:`TextData`'s; ``context`` limits the target, not the source.

    Raises:
        UserError: naming the file and line that is no pair, or whose source another split has too.
    """
    if path is None:
        raise UserError("data.path", "null", f"a .jsonl file, or a table of {source} and {target}")
    if source == target:
        raise UserError("data.target", f"{target}, which is data.source too", "another key or column")
    for split, own, amount in (("test", test_path, test), ("val", val_path, val)):
        if own is not None and amount:
            raise UserError(f"data.{split}", f"{amount} beside data.{split}_path", "one of the two")
    seed = common.get("split_seed", 0)
    notes: list[str] = []
    files = {"path": path, "val_path": val_path, "test_path": test_path}
    held = {key: _read(file, source, target, f"data.{key}", notes) for key, file in files.items() if file is not None}
    _check_apart(held, files)
    by_split = {"train": held["path"]}
    notes += _repeated(by_split["train"], path)
    for split, amount in (("test", test), ("val", val)):
        if f"{split}_path" in held:
            by_split[split] = held[f"{split}_path"]
        else:
            by_split["train"], by_split[split] = _split_off(by_split["train"], amount, seed, split)
    name = Path(path).name

    def read(tokenizer: Tokenizer) -> RawText:
        splits = {
            split: [_sequence(tokenizer, prefix + pair.source, pair.target) for pair in some]
            for split, some in by_split.items()
            if some
        }
        words = {split: sum(len(pair.target.split()) for pair in some) for split, some in by_split.items() if some}
        return RawText(name, tokenizer, splits, words)

    def learned() -> Iterator[str]:
        return (prefix + text for pair in by_split["train"] for text in (pair.source, pair.target))

    data = text_data(read, learned, alphabet=None, **common)
    data.notes = tuple(notes)
    return data


def _sequence(tokenizer: Tokenizer, source: str, target: str) -> Sequence:
    start, end = [tokenizer.eos_id], [tokenizer.eos_id]
    encoder = torch.tensor([*tokenizer.encode(source), *end], dtype=torch.int32)
    question = Question(torch.tensor(start, dtype=torch.int32), target, text=source, source=encoder)
    return Sequence.of(
        [(start, PROMPT), ([*tokenizer.encode(target), *end], ANSWER)], question=question, source=encoder
    )


def _split_off(train: list[Pair], amount: int | float | None, seed: int, split: str) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into those outside and those of a split: all pairs of a source, or none of them."""
    count = rows_of(0.1 if amount is None else amount, len(train), f"data.{split}")
    of: dict[str, list[int]] = {}
    for number, pair in enumerate(train):
        of.setdefault(_alike(pair), []).append(number)
    groups = list(of.values())
    if count and len(groups) == 1:
        raise UserError(f"data.{split}", f"all {len(train)} pairs have one source, {train[0].source[:60]!r}", "0")
    order: list[list[int]] = [groups[n] for n in permutation(len(groups), seed, "split", split).tolist()]
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if count and not chosen:  # no source has so few pairs
        chosen.update(sorted(order, key=len)[0])
    return (
        [pair for number, pair in enumerate(train) if number not in chosen],
        [train[number] for number in sorted(chosen)],
    )


def _alike(pair: Pair) -> str:
    """Return a source as it is compared: with white space normalised."""
    return " ".join(pair.source.split())


def _repeated(train: list[Pair], path: str) -> list[str]:
    count = len(train) - len({_alike(pair) for pair in train})
    return [f"{count} of {len(train)} pairs of {path} repeat a source; those of one stay in one split"] if count else []


def _check_apart(held: Mapping[str, list[Pair]], files: Mapping[str, str | None]) -> None:
    """Refuse sources that stand in two files.

    Raises:
        UserError: with their number, and the first of them.
    """
    for key, other in (("test_path", "path"), ("val_path", "path"), ("test_path", "val_path")):
        if key in held and other in held:
            known = {_alike(pair): pair.line for pair in reversed(held[other])}
            if shared := [pair for pair in held[key] if _alike(pair) in known]:
                first, of = shared[0], f"{len(shared)} of {len(held[key])} pairs of {files[key]}"
                raise UserError(
                    f"data.{key}",
                    (
                        f"{of} have a source of data.{other}, such as line {first.line}, {first.source[:60]!r}"
                        f" (line {known[_alike(first)]} of {files[other]})"
                    ),
                    "other sources than there",
                )


def _read(path: str, source: str, target: str, key: str, notes: list[str]) -> list[Pair]:
    """Read the pairs of a file; ``notes`` gets a line where it has no header."""
    file = Path(path).expanduser()
    try:
        with open_text(file) as opened:
            text = opened.read().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(key, f"{path} is no UTF-8 text") from None
    except OSError as error:
        raise UserError(key, f"cannot read {path} ({error.strerror})", "a .jsonl file or a table") from None
    except Unreadable as error:
        raise UserError(key, f"cannot read {path} ({error})", "a .jsonl file or a table") from None
    # split("\n"), since str.splitlines also breaks at characters that JSON allows inside of a text
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(key, f"{path} is empty", f"lines of {source} and {target}")
    form = _objects if file.suffix in (".jsonl", ".json", ".ndjson") else _columns
    rows = []
    for number, one, other in form(lines, source, target, f"{key}: {path}"):
        if not (isinstance(one, str) and isinstance(other, str)):
            raise UserError(key, f"{path}, line {number}: {source} and {target} must be texts")
        if not (one.strip() and other.strip()):
            empty = target if one.strip() else source
            raise UserError(key, f"{path}, line {number}: {empty} is empty", "a text in both")
        rows.append(Pair(one, other, number))
    if not rows:
        raise UserError(key, f"{path} has a header and no pairs")
    if form is _columns and rows[0].line == lines[0][0]:
        notes.append(f"{path} has no header with {source} and {target}; its first line is a pair")
    return rows


def _objects(
    lines: list[tuple[int, str]], source: str, target: str, where: str
) -> Iterator[tuple[int, object, object]]:
    for number, line in lines:
        try:
            held = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, line {number}", f"no JSON ({error})", "one object a line") from None
        if not isinstance(held, dict):
            raise UserError(f"{where}, line {number}", f"a {type(held).__name__}", f"{source!r} and {target!r}")
        for key, name in (("source", source), ("target", target)):
            if name not in held:
                near = f" (nearest: {closest[0]})" if (closest := nearest(name, held, 1)) else ""
                raise UserError(
                    f"{where}, line {number}",
                    f"{', '.join(held) or 'nothing'}",
                    f"{source!r} and {target!r}; data.{key} names another key{near}",
                )
        yield number, held[source], held[target]


def _columns(lines: list[tuple[int, str]], source: str, target: str, where: str) -> Iterator[tuple[int, str, str]]:
    header = [name.strip() for name in lines[0][1].split("\t")]
    named = _is_header(header, source, target, where)
    width = len(header) if named else 2
    first, second = (header.index(source), header.index(target)) if named else (0, 1)
    for number, line in lines[named:]:
        cells = line.split("\t")
        if len(cells) != width:
            wanted = "columns as in the header" if named else f"source and target, or a header with {source}, {target}"
            raise UserError(f"{where}, line {number}", f"{len(cells)} columns", f"{width}, {wanted}")
        yield number, cells[first], cells[second]


def _is_header(header: list[str], source: str, target: str, where: str) -> bool:
    """Return whether a table's first line names its columns.

    Raises:
        UserError: if it names only some of those asked for, names one twice, or names are alike to those asked for.
    """
    for name in (source, target):
        if header.count(name) > 1:
            raise UserError(f"{where}, line 1", f"two columns are named {name!r}", "different names")
    if source in header and target in header:
        return True
    slips = {misspelt(name, (source, target)) for name in header} - {None}
    for key, name in (("source", source), ("target", target)):
        asked_for = name != key  # nobody names the columns of a table without a header
        if name not in header and (asked_for or slips >= {source, target} or {source, target} & set(header)):
            raise unknown(f"{where}, line 1 (data.{key})", name, header, "column")
    return False
