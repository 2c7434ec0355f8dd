"""Published questions with a large teacher's reasoning (SVAMP, CommonsenseQA), and GSM8K's worked solutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from kdlab.data.text.answers import (
    MARKER,
    Choices,
    extract,
    named,
    normalise,
    number,
    operations,
    same_number,
    same_text,
    same_value,
    value,
    without_calculator,
)
from kdlab.data.text.build import TextCommon
from kdlab.data.text.datasets.traces import KEEP, read_lines, report, text_of
from kdlab.data.text.module import TextData
from kdlab.data.text.templates import TEMPLATE, Example, Right, check_form, examples_data, hold_out
from kdlab.errors import UserError, unknown

LABELS = ("gold", "teacher")


@dataclass(frozen=True)
class _Row:
    """Question with what is known about it, and its teacher's reasoning and answer."""

    question: str
    gold: str
    reasoning: str | None
    answer: str | None
    choices: tuple[str, ...] = ()


def svamp(
    root: str = "data/reasoning",
    form: str = "steps",
    labels: str = "gold",
    keep: str = "all",
    val: int | float = 0.1,
    rationale_weight: float = 1.0,
    complete: bool = True,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load SVAMP: 800 and 200 sums in words (Patel et al., 2021), with a 540B model's reasoning (Hsieh et al., 2023).

    Answers are expressions such as ``( 84.0 / 2.0 )``, right if they come to the same; a question's group is the number
    of operations in it. A teacher that gave no answer did not finish its reasoning, which is left out then.

    Args:
        root: the folder that holds ``svamp_train.jsonl`` and ``svamp_test.jsonl``, or a folder ``reasoning`` with them;
            keys ``question``, ``answer``, ``teacher_reasoning`` and ``teacher_answer``, which may be null.
        form: ``steps``, ``answer`` or ``both``; see :func:`kdlab.data.text.templates.sequences`.
        labels: answers that are learned: ``gold``, or the ``teacher``'s. Measures always compare with the former.
        keep: learn from ``all`` rows, those where the teacher is ``right``, or those where its reasoning and answer
            are ``agreeing``, which can be told without gold answers.
        val: rows (a number, or a share) taken from train for validation, never filtered; 0 for none.
        rationale_weight: weight of the second task, with form ``both``.
        complete: learn from rows with reasoning and answer alone, whatever the form, so that forms compare; false
            learns from all that have what the form needs.

    The other arguments are :func:`text_data`'s, with ``tokenizer`` bpe, ``vocab`` 1,000 and ``context`` 256
    unless given.

    Raises:
        UserError: naming the file, line and key of what is wrong, or the option.
    """
    check_form(form, rationale_weight, complete)
    parts = _parts(root, "svamp", val, common.get("split_seed", 0))
    train = _kept(parts["train"], keep, lambda row: same_value(row.answer or "", row.gold), _sum_agrees)
    examples = {
        split: [_example(row, labels, row.question, str(operations(row.gold))) for row in rows]
        for split, rows in (parts | {"train": train}).items()
    }
    _sizes(common, 1000, 256)
    return examples_data("svamp", examples, Right(same_value), form, rationale_weight, TEMPLATE, complete, **common)


def cqa(
    root: str = "data/reasoning",
    form: str = "steps",
    labels: str = "gold",
    keep: str = "all",
    val: int | float = 0.1,
    rationale_weight: float = 1.0,
    complete: bool = True,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load CommonsenseQA: 9,741 and 1,221 questions with five choices, with a 540B model's reasoning.

    Talmor et al., NAACL 2019; the reasoning: Hsieh et al., Findings of ACL 2023.

    The answer is the text of a choice, and nothing else; its letter alone counts as well.

    Args:
        root: the folder that holds ``cqa_train.jsonl`` and ``cqa_test.jsonl``, or a folder ``reasoning`` with them;
            keys as for :func:`svamp`, and ``choices``.
        form: see :func:`svamp`.
        labels: see :func:`svamp`.
        keep: see :func:`svamp`.
        val: see :func:`svamp`.
        rationale_weight: see :func:`svamp`.
        complete: see :func:`svamp`.

    The other arguments are :func:`text_data`'s, with ``tokenizer`` bpe, ``vocab`` 2,000 and ``context`` 256
    unless given.

    Raises:
        UserError: naming the file, line and key of what is wrong, or the option.
    """
    check_form(form, rationale_weight, complete)
    parts = _parts(root, "cqa", val, common.get("split_seed", 0))
    train = _kept(parts["train"], keep, lambda row: same_text(row.answer or "", row.gold), _choice_agrees)
    examples = {
        split: [_example(row, labels, _with_choices(row)) for row in rows]
        for split, rows in (parts | {"train": train}).items()
    }
    choices = Choices({_with_choices(row): row.choices for rows in parts.values() for row in rows})
    _sizes(common, 2000, 256)
    return examples_data("cqa", examples, Right(choices), form, rationale_weight, TEMPLATE, complete, **common)


def gsm8k(
    root: str = "data/gsm8k",
    form: str = "steps",
    calculator: bool = False,
    val: int | float = 0.1,
    rationale_weight: float = 1.0,
    **common: Unpack[TextCommon],
) -> TextData:
    """Load GSM8K: 7,473 and 1,319 grade-school sums in words with worked solutions (Cobbe et al., 2021).

    A question's group is the number of lines of its solution.

    Args:
        root: the folder that holds the publisher's ``train.jsonl`` and ``test.jsonl``, or a folder ``gsm8k`` with them.
        form: ``steps``, ``answer`` or ``both``; see :func:`kdlab.data.text.templates.sequences`.
        calculator: keep the marks ``<<48/2=24>>``.
        val: rows (a number, or a share) taken from train for validation; 0 for none.
        rationale_weight: weight of the second task, with form ``both``.

    The other arguments are :func:`text_data`'s, with ``tokenizer`` bpe, ``vocab`` 4,000 and ``context`` 512
    unless given.

    Raises:
        UserError: naming the file, line and key of what is wrong, or the option.
    """
    check_form(form, rationale_weight)
    if not isinstance(calculator, bool):
        raise UserError("data.calculator", f"{calculator!r}", "true or false")
    folder = _folder(root, "gsm8k", "train.jsonl")
    examples = {split: _solutions(folder / f"{split}.jsonl", calculator) for split in ("train", "test")}
    examples["train"], examples["val"] = hold_out(examples["train"], val, common.get("split_seed", 0), "val")
    _sizes(common, 4000, 512)
    right = Right(same_number)
    return examples_data("gsm8k", examples, right, form, rationale_weight, TEMPLATE, complete=True, **common)


def _sizes(common: TextCommon, vocab: int, context: int) -> None:
    """Set the defaults: a tokenizer of pieces of words, and room for the longest of the published questions."""
    if "tokenizer" not in common:
        common["tokenizer"] = "bpe"
        common.setdefault("vocab", vocab)
    common.setdefault("context", context)


# ---- files


def _folder(root: str, name: str, file: str) -> Path:
    base = Path(root).expanduser()
    for folder in (base, base / name):
        if (folder / file).is_file():
            return folder
    raise UserError("data.root", f"no {file} in {base}", "a folder that holds it (KDLAB_DATA says where data are)")


def _parts(root: str, name: str, val: int | float, seed: int) -> dict[str, list[_Row]]:
    folder = _folder(root, "reasoning", f"{name}_train.jsonl")
    parts = {split: _rows(folder / f"{name}_{split}.jsonl", name == "cqa") for split in ("train", "test")}
    parts["train"], parts["val"] = hold_out(parts["train"], val, seed, "val")
    return parts


def _rows(path: Path, with_choices: bool) -> list[_Row]:
    rows = []
    for line, held in read_lines(path, "data.root"):
        where = f"data.root: {path}, line {line}"
        answer = text_of(held, "teacher_answer", where)
        reasoning = text_of(held, "teacher_reasoning", where)
        rows.append(
            _Row(
                question=(text_of(held, "question", where, required=True) or "").strip(),
                gold=(text_of(held, "answer", where, required=True) or "").strip(),
                reasoning=None if answer is None or reasoning is None else reasoning.strip(),
                answer=None if answer is None else answer.strip(),
                choices=_choices(held, where) if with_choices else (),
            )
        )
        if with_choices and rows[-1].gold not in rows[-1].choices:
            raise unknown(f"{where}, key 'answer'", rows[-1].gold, rows[-1].choices, "choice")
    return rows


def _choices(held: Mapping[str, Any], where: str) -> tuple[str, ...]:
    choices = held.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise UserError(where, f"key 'choices' is {choices!r}", "a list of two or more texts")
    return tuple(one.strip() for one in choices)


def _solutions(path: Path, calculator: bool) -> list[Example]:
    examples = []
    for line, held in read_lines(path, "data.root"):
        where = f"data.root: {path}, line {line}"
        question = text_of(held, "question", where, required=True) or ""
        solution = text_of(held, "answer", where, required=True) or ""
        answer = extract(solution)
        if answer is None or number(answer) is None:
            raise UserError(where, f"key 'answer' has no number after {MARKER!r}", "a solution that ends so")
        worked = solution.rpartition(MARKER)[0].strip()
        worked = worked if calculator else without_calculator(worked)
        group = str(sum(1 for part in worked.split("\n") if part.strip()))
        examples.append(Example(question.strip(), worked, answer, answer, group))
    return examples


# ---- what is learned


def _with_choices(row: _Row) -> str:
    listed = " ".join(f"({chr(ord('a') + place)}) {text}" for place, text in enumerate(row.choices))
    return f"{row.question}\nChoices: {listed}"


def _example(row: _Row, labels: str, question: str, group: str = "") -> Example:
    if labels not in LABELS:
        raise unknown("data.labels", labels, LABELS, "choice")
    return Example(question, row.reasoning, row.gold if labels == "gold" else row.answer, row.gold, group)


def _kept(rows: list[_Row], keep: str, right: Callable[[_Row], bool], agrees: Callable[[_Row], bool]) -> list[_Row]:
    if keep not in KEEP:
        raise unknown("data.keep", keep, KEEP, "choice")
    if keep == "all":
        return rows
    chosen = right if keep == "right" else agrees
    return report(rows, [row for row in rows if row.answer is not None and chosen(row)], keep)


def _sum_agrees(row: _Row) -> bool:
    """Return whether the last number of the reasoning is the value of the teacher's expression."""
    result, last = value(row.answer or ""), number(row.reasoning or "")
    return result is not None and result == last


def _choice_agrees(row: _Row) -> bool:
    """Return whether the last sentence of the reasoning names the teacher's choice and no other."""
    sentences = (row.reasoning or "").strip(". \n").split(". ")
    mentioned = named(sentences[-1], row.choices)
    return mentioned is not None and normalise(mentioned) == normalise(row.answer or "")
