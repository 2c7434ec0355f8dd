"""Traces: what teachers wrote, one JSON object a line, and which of it is worth learning.

======== ===============================================================================================
key      value
======== ===============================================================================================
question text; or ``messages``: a list of ``{"role": ..., "content": ...}``
reasoning, answer  text, or null where the teacher gave none
teacher  who wrote it
gold     the right answer, where it is known
correct  whether the answer is right, where somebody judged it
group    what measures are told apart by
======== ===============================================================================================

Other keys are kept as they are. A file grows by whole lines, each on the disk before the next one is begun: what a
killed process leaves is its lines and perhaps a part of the last one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Some
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from kdlab.data.text.answers import Same, same_number, same_text, same_value
from kdlab.data.text.build import TextCommon
from kdlab.data.text.module import TextData
from kdlab.data.text.templates import TEMPLATE, Example, Right, check_form, examples_data, hold_out, without
from kdlab.errors import UserError, misspelt, unknown
from kdlab.system.files import Unreadable, atomic_write, open_regular, open_to_append

log = logging.getLogger("kdlab")

COMPARE: dict[str, Same] = {"text": same_text, "number": same_number, "value": same_value}
"""Comparisons of two answers by name: as words, by their last number, or as arithmetic expressions."""
KEEP = ("all", "right", "agreeing")


@dataclass(frozen=True)
class Trace:
    """Reasoning and answer of a teacher to one question.

    Args:
        question: question as text; of ``messages``, their content.
        reasoning: the steps to the answer; None where the teacher gave none.
        answer: the teacher's answer; None where it gave none.
        teacher: name of the teacher that wrote it.
        messages: the conversation that was asked, where it was one.
        gold: the right answer, where it is known.
        correct: whether the answer is right, where somebody judged it.
        group: group that measures are reported by.
        extra: further keys of the line.
    """

    question: str
    reasoning: str | None = None
    answer: str | None = None
    teacher: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    gold: str | None = None
    correct: bool | None = None
    group: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """Return this trace as a line of a file, with its line break."""
        held: dict[str, Any] = {"messages": list(self.messages)} if self.messages else {"question": self.question}
        held |= {"reasoning": self.reasoning, "answer": self.answer}
        optional = {"teacher": self.teacher, "gold": self.gold, "correct": self.correct, "group": self.group or None}
        held |= {key: value for key, value in optional.items() if value is not None}
        return json.dumps(held | dict(self.extra), ensure_ascii=False).encode() + b"\n"


# ---- files


def read_lines(path: str | Path, key: str = "data.path", torn: bool = False) -> list[tuple[int, dict[str, Any]]]:
    """Read the line numbers and objects of a JSONL file; empty lines are skipped.

    Args:
        path: the file.
        key: the config key to name in errors.
        torn: leave out a last line that was cut off, as by a killed process, instead of complaining.

    Raises:
        UserError: naming the file and line that hold no JSON object, or the file that cannot be read or holds none.
    """
    path = Path(path).expanduser()
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(key, f"cannot read {path} ({reason})", "a JSONL file") from None
    lines = content.split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            if number == len(lines):  # the file does not end in a line break
                if torn:
                    break
                raise UserError(key, f"{path}, line {number} is cut off", "whole lines (remove it)") from None
            raise UserError(key, f"{path}, line {number} is no JSON ({error})", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(key, f"{path}, line {number} is a {type(row).__name__}", "a JSON object")
        rows.append((number, row))
    if not rows and not torn:
        raise UserError(key, f"{path} is empty", "one JSON object a line")
    return rows


def text_of(row: Mapping[str, Any], name: str, where: str, required: bool = False) -> str | None:
    """Return the text under a key of a row; None for null or a missing key. Numbers count as text.

    Args:
        row: object of a line.
        name: name of the key.
        where: the start of an error: config key, file and line.
        required: refuse null, blank text, and a row without the key.

    Raises:
        UserError: for a value of another type.
    """
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = repr(value)
    if required and not (isinstance(value, str) and value.strip()):
        problem = f"is {value!r}" if name in row else f"is missing (there are {', '.join(row) or 'none'})"
        raise UserError(where, f"key {name!r} {problem}", "text")
    if value is not None and not isinstance(value, str):
        raise UserError(where, f"key {name!r} is a {type(value).__name__}", "text, or null")
    return value


def read_traces(path: str | Path, key: str = "data.path", torn: bool = False) -> list[Trace]:
    """Read the traces of a JSONL file.

    Args:
        path: the file.
        key: the config key to name in errors.
        torn: leave out a last line that was cut off, to go on with writing after a kill; a file without traces is
            then fine as well.

    Raises:
        UserError: naming the file, the line and the key of what is wrong.
    """
    rows = read_lines(path, key, torn)
    _say_misspelt(rows, f"{key}: {path}")
    return [_trace(row, f"{key}: {path}, line {number}") for number, row in rows]


def _say_misspelt(rows: Some[tuple[int, Mapping[str, Any]]], where: str) -> None:
    """Log keys that look like slips of known ones, and so are not read; each once."""
    seen: set[str] = set()
    for number, row in rows:
        for name in sorted(row.keys() - seen - set(_KEYS)):
            seen.add(name)
            if meant := misspelt(name, [one for one in _KEYS if one not in row]):
                log.warning("%s, line %d: key %r is kept, and not read as %r", where, number, name, meant)


_KEYS = ("question", "messages", "reasoning", "answer", "teacher", "gold", "correct", "group")


def _trace(row: dict[str, Any], where: str) -> Trace:
    messages = _messages(row["messages"], where) if row.get("messages") is not None else None
    if messages and row.get("question") is not None:
        raise UserError(where, "keys 'question' and 'messages' exclude each other", "one of them")
    answer = text_of(row, "answer", where)
    if messages and len(messages) > 1 and messages[-1]["role"] == "assistant" and answer is None:
        messages, answer = messages[:-1], messages[-1]["content"]
    question = _spoken(messages) if messages else text_of(row, "question", where, required=True)
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise UserError(where, f"key 'correct' is {correct!r}", "true, false, or null")
    return Trace(
        question=question or "",
        reasoning=text_of(row, "reasoning", where),
        answer=answer,
        teacher=text_of(row, "teacher", where),
        messages=messages,
        gold=text_of(row, "gold", where),
        correct=correct,
        group=text_of(row, "group", where) or "",
        extra={name: value for name, value in row.items() if name not in _KEYS},
    )


def _messages(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    fine = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    if not fine or not all(isinstance(one.get(part), str) for one in value for part in ("role", "content")):
        raise UserError(where, "key 'messages' is no conversation", "a list of {role: text, content: text}")
    return tuple({"role": one["role"], "content": one["content"]} for one in value)


def _spoken(messages: Some[Mapping[str, str]]) -> str:
    """Join a conversation into one text; for a single message, its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def write_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write a file of traces, which appears whole or not at all."""
    with atomic_write(Path(path).expanduser()) as file:
        for trace in traces:
            file.write(trace.line())


def append_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Add traces to the end of a file (a new one if there is none); they are on the disk on return.

    A part of a line that a killed process left at the end is removed first.
    """
    path = Path(path).expanduser()
    added = b"".join(trace.line() for trace in traces)
    with os.fdopen(open_to_append(path, read=True), "a+b") as file:
        _mend(file)
        file.write(added)
        file.flush()
        os.fsync(file.fileno())


def _mend(file: Any) -> None:
    """Bring a file that is open for appending to the end of its last whole line."""
    size = file.seek(0, os.SEEK_END)
    block, tail = 1 << 16, b""
    while size > len(tail) and b"\n" not in tail:
        start = max(0, size - len(tail) - block)
        file.seek(start)
        tail = file.read(size - start)
    last = tail.rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        file.truncate(size - len(last))
    else:  # a whole object, by a writer who ends no lines
        file.write(b"\n")


# ---- filters


def right_ones(traces: Some[Trace], same: Same = same_text, key: str = "data.keep") -> list[Trace]:
    """Return the traces with a right answer: judged so (``correct``), or the same as ``gold``; no answer is wrong.

    Raises:
        UserError: if there is a trace with an answer that neither was judged nor has a ``gold``.
    """
    kept = []
    for number, trace in enumerate(traces):
        if trace.correct is None and trace.gold is None:
            raise UserError(
                key,
                f"right; trace {number} ({trace.question[:40]!r}) has neither 'correct' nor 'gold'",
                "all, agreeing, or traces that have one of them",
            )
        if trace.answer is not None and (
            trace.correct if trace.correct is not None else same(trace.answer, trace.gold or "")
        ):
            kept.append(trace)
    return kept


def agreeing_ones(traces: Some[Trace], same: Same = same_text, agree: float = 0.5) -> list[Trace]:
    """Return the traces with their question's most frequent answer (self-consistency: Wang et al., ICLR 2023).

    Args:
        traces: several of a question; no order is needed.
        same: comparison of two answers.
        agree: the least share of a question's traces that must give the answer; those without an answer count. Two at
            least must give it: a trace alone agrees with nobody. Of answers given equally often, the first is taken.
    """
    asked: dict[str, list[Trace]] = {}
    for trace in traces:
        asked.setdefault(trace.question, []).append(trace)
    kept: set[int] = set()
    for of_one in asked.values():
        camps: list[list[Trace]] = []
        for trace in of_one:
            if trace.answer is None:
                continue
            for camp in camps:
                if same(trace.answer, camp[0].answer or ""):
                    camp.append(trace)
                    break
            else:
                camps.append([trace])
        largest = max(camps, key=len, default=[])
        if len(largest) >= max(2, agree * len(of_one)):
            kept.update(id(trace) for trace in largest)
    return [trace for trace in traces if id(trace) in kept]


def select(traces: Some[Trace], keep: str = "all", same: Same = same_text, agree: float = 0.5) -> list[Trace]:
    """Select the traces that are worth learning, in their order, and log their number.

    Args:
        traces: all there are.
        keep: ``all``, ``right`` (:func:`right_ones`) or ``agreeing`` (:func:`agreeing_ones`).
        same: comparison of two answers.
        agree: see :func:`agreeing_ones`.

    Raises:
        UserError: for another ``keep``, an ``agree`` that is no share, or if nothing is left.
    """
    if keep not in KEEP:
        raise unknown("data.keep", keep, KEEP, "choice")
    if isinstance(agree, bool) or not isinstance(agree, (int, float)) or not 0 < agree <= 1:
        raise UserError("data.agree", f"{agree!r}", "a share above 0, up to 1")
    if keep == "all":
        return list(traces)
    return report(traces, right_ones(traces, same) if keep == "right" else agreeing_ones(traces, same, agree), keep)


def report(traces: Some[Any], kept: list[Any], keep: str) -> list[Any]:
    """Return ``kept``, after logging its share of ``traces``.

    Raises:
        UserError: if it is none.
    """
    if not kept:
        raise UserError("data.keep", f"{keep}; none of {len(traces)} traces is left", "all, or other traces")
    log.info("traces: %d of %d kept (%s), %.1f %%", len(kept), len(traces), keep, 100 * len(kept) / len(traces))
    return kept


# ---- the data set


def traces(
    path: str | None = None,
    test_path: str | None = None,
    test: int | float = 0.1,
    val: int | float = 0.1,
    form: str = "steps",
    keep: str = "all",
    agree: float = 0.5,
    compare: str = "text",
    rationale_weight: float = 1.0,
    complete: bool = True,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load traces that a teacher wrote, to learn from (sequence-level distillation: Kim and Rush, EMNLP 2016).

    Questions, not traces, are divided into train, validation and test, by ``split_seed``: no question is in two of
    them, and those of ``path`` that ``test_path`` asks as well are left out. Only training traces are filtered.
    Validation and test ask each question once, and compare with ``gold``, or where there is none, with the teacher's
    answer.

    Args:
        path: a JSONL file; see :mod:`kdlab.data.text.datasets.traces`.
        test_path: another one, for the test split.
        test: questions (a number, or a share) taken for the test split where there is no ``test_path``.
        val: questions (a number, or a share) taken for validation; 0 for none.
        form: ``steps``, ``answer`` or ``both``; see :func:`kdlab.data.text.templates.sequences`.
        keep: ``all`` traces, those with a ``right`` answer, or those ``agreeing`` with others about the question.
        agree: the least share of a question's traces that must give the same answer, for ``agreeing``.
        compare: comparison of answers: as ``text``, by their last ``number``, or by the ``value`` of expressions.
        rationale_weight: weight of the second task, with form ``both``.
        complete: learn from traces with reasoning and answer alone, whatever the form, so that forms compare; false for
            traces without reasoning.

    The other arguments are :func:`text_data`'s.

    Raises:
        UserError: naming the file, line and key of what is wrong, or the option.
    """
    if path is None:
        raise UserError("data.path", "null", "a JSONL file of traces")
    check_form(form, rationale_weight, complete)
    if compare not in COMPARE:
        raise unknown("data.compare", compare, COMPARE, "comparison")
    seed = common.get("split_seed", 0)
    rows, parts = read_traces(path), {}
    if test_path is not None:
        parts["test"] = read_traces(test_path, "data.test_path")
    else:
        rows, parts["test"] = hold_out(rows, test, seed, "test")
    rows, parts["val"] = hold_out(without(rows, parts["test"], "test"), val, seed, "val")
    parts["train"] = select(without(rows, parts["val"], "val"), keep, COMPARE[compare], agree)
    once = {split: list({trace.question: trace for trace in reversed(parts[split])}.values()) for split in parts}
    once["train"] = parts["train"]
    examples = {
        split: [Example(one.question, one.reasoning, one.answer, one.gold, one.group) for one in rows]
        for split, rows in once.items()
    }
    right = Right(COMPARE[compare])
    return examples_data(Path(path).stem, examples, right, form, rationale_weight, TEMPLATE, complete, **common)
