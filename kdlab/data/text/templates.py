"""How a question, its reasoning and its answer become sequences of tokens.

Every token knows which segment it is part of, so that a loss can weigh prompt, reasoning and answer apart. Segments are
turned into tokens one by one: a token never reaches over a border, and the prompt that a network is asked with is the
same tokens that it was trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Some
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch

from kdlab.data.splits import rows_of
from kdlab.data.text.answers import MARKER, Choices, Same, extract
from kdlab.data.text.build import TextCommon, text_data
from kdlab.data.text.module import TextData
from kdlab.data.text.sequence import ANSWER, PROMPT, REASONING, Question, RawText, Sequence
from kdlab.data.text.tokenizer import Tokenizer
from kdlab.errors import UserError, unknown
from kdlab.functional.rng import permutation

log = logging.getLogger("kdlab")

FORMS = ("steps", "answer", "both")


@dataclass(frozen=True)
class Template:
    r"""Text around the parts of a sequence.

    ====== ==========================================================================================
    form   sequences of ``Template()``
    ====== ==========================================================================================
    steps  ``Q: <question>\\nA:`` ``·<reasoning>`` ``\\n#### <answer><eos>``
    answer ``Q: <question>\\nA:`` ``·#### <answer><eos>``
    both   ``[label] Q: <question>\\nA:`` ``·#### <answer><eos>`` and
           ``[rationale] Q: <question>\\nA:`` ``·<reasoning><eos>``
    ====== ==========================================================================================

    (``·`` is a space.) The marker stands before the answer in every form, and belongs to its segment, so that answers
    are found alike in what any network writes.

    Args:
        before: text before the question.
        after: text between the question and what a network writes.
        gap: text before the first thing written.
        line: text between reasoning and answer.
        marker: text before the answer.
        label: the prefix of the task to answer, with form ``both``.
        rationale: the prefix of the task to explain, with form ``both``.
        alphabet: characters that a tokenizer of characters knows beside those that there are.
    """

    before: str = "Q: "
    after: str = "\nA:"
    gap: str = " "
    line: str = "\n"
    marker: str = f"{MARKER} "
    label: str = "[label] "
    rationale: str = "[rationale] "
    alphabet: str = ""

    def prompt(self, question: str, task: str = "") -> str:
        """Return the prompt that asks a network the question."""
        return f"{task}{self.before}{question}{self.after}"


TEMPLATE = Template()
"""Template for questions in words."""
TERSE = Template(
    before="", after=":", gap="", line="", marker=">", label="L", rationale="R", alphabet="0123456789+-*=;():>LR"
)
"""Template for sums: ``37+58-21:37+58=95;95-21=74>74``; a network can be asked about operations it has not learned."""


@dataclass(frozen=True)
class Example:
    """Question with what is to be learned about it.

    Args:
        question: question as text.
        reasoning: the steps to the answer; None where there are none.
        answer: the answer to learn; None where there is none.
        gold: the right answer, to measure with; None is ``answer``.
        group: group that measures are reported by, such as the number of steps.
    """

    question: str
    reasoning: str | None = None
    answer: str | None = None
    gold: str | None = None
    group: str = ""


def check_form(form: str, rationale_weight: float, complete: bool = True) -> None:
    """Check the options of a form.

    Raises:
        UserError: for a form that there is not, a weight that is none, or ``complete`` that is neither true nor false.
    """
    if form not in FORMS:
        raise unknown("data.form", form, FORMS, "form")
    if not isinstance(complete, bool):
        raise UserError("data.complete", f"{complete!r}", "true or false")
    if isinstance(rationale_weight, bool) or not isinstance(rationale_weight, (int, float)):
        raise UserError("data.rationale_weight", f"{rationale_weight!r}", "a number from 0 on")
    if not 0 <= rationale_weight < float("inf"):
        raise UserError("data.rationale_weight", rationale_weight, "a number from 0 on")


def texts(examples: Iterable[Example], form: str, template: Template = TEMPLATE) -> list[str]:
    """Return the sequences of some examples as text."""
    tasks = (parts for example in examples for parts, _ in _tasks(example, form, template))
    return ["".join(text for text, _ in parts) for parts in tasks]


def learnable(example: Example, form: str) -> bool:
    """Return whether there is anything to learn from an example in this form.

    ``steps`` needs reasoning and answer (an answer without reasoning would teach to skip it), ``answer`` the answer,
    ``both`` one of the two.
    """
    reasoned, answered = bool(example.reasoning), bool(example.answer)
    return {"steps": reasoned and answered, "answer": answered, "both": reasoned or answered}[form]


def sequences(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    form: str = "steps",
    *,
    template: Template = TEMPLATE,
    rationale_weight: float = 1.0,
    ask: bool = False,
) -> list[Sequence]:
    """Build the sequences of some examples, each ended by the tokenizer's end of text.

    The form ``both`` is distilling step-by-step (Hsieh et al., "Distilling Step-by-Step! Outperforming Larger Language
    Models with Less Training Data and Smaller Model Sizes", Findings of ACL 2023): two tasks, told apart by a prefix,
    L = L_label + rationale_weight · L_rationale. Rationales are then not needed to answer, and cost nothing at test.
    The sums here run over tokens, while the paper averages each task over its own. An example is two sequences then, so
    an epoch has twice as many steps as with the other forms, unless ``data.batch_size`` is doubled.

    Args:
        examples: examples to learn from.
        tokenizer: tokenizer of the sequences.
        form: ``steps``, ``answer`` or ``both``.
        template: the text around the parts.
        rationale_weight: weight of the second task of ``both``.
        ask: attach the question, as for validation and test; no example with a known answer is left out then. The
            network is asked with the prompt that its answers were trained on.
    """
    made = []
    for example in examples:
        if ask:
            example = replace(example, answer=example.answer or example.gold)
        if not (example.answer if ask else learnable(example, form)):
            continue
        for parts, answers in _tasks(example, form, template):
            question = _question(example, tokenizer, parts[0][0]) if ask and answers else None
            pieces = [(tokenizer.encode(text), segment) for text, segment in parts]
            pieces.append(([tokenizer.eos_id], parts[-1][1]))
            weight = 1.0 if answers else float(rationale_weight)
            made.append(Sequence.of(pieces, question=question, weight=weight))
    return made


def _tasks(example: Example, form: str, template: Template) -> Iterator[tuple[list[tuple[str, int]], bool]]:
    """Yield the sequences of an example as (text, segment) pairs, and whether each is one that ends in the answer."""
    reasoning, answer = example.reasoning or "", example.answer or ""
    if form == "steps" and reasoning:
        prompt = (template.prompt(example.question), PROMPT)
        yield [prompt, (template.gap + reasoning, REASONING), _last(template.line, template, answer)], True
        return
    prompt = (template.prompt(example.question, template.label if form == "both" else ""), PROMPT)
    if answer or form != "both":
        yield [prompt, _last(template.gap, template, answer)], True
    if form == "both" and reasoning:
        prompt = (template.prompt(example.question, template.rationale), PROMPT)
        yield [prompt, (template.gap + reasoning, REASONING)], False


def _last(before: str, template: Template, answer: str) -> tuple[str, int]:
    return before + template.marker + answer, ANSWER


def _question(example: Example, tokenizer: Tokenizer, prompt: str) -> Question:
    gold = example.gold if example.gold is not None else example.answer
    return Question(
        prompt=torch.tensor(tokenizer.encode(prompt), dtype=torch.int32),
        answer=gold or "",
        group=example.group,
        text=example.question,
    )


@dataclass(frozen=True)
class Right:
    """Judge of generated texts by their final answer; one that cannot be read is wrong.

    Args:
        same: comparison of two answers, or one that knows the choices of every question.
        marker: text before the answer.
    """

    same: Same | Choices
    marker: str = MARKER

    def __call__(self, question: Question, text: str) -> bool:
        """Return whether an answer is right."""
        given = extract(text, self.marker)
        if given is None:
            return False
        if isinstance(self.same, Choices):
            return self.same.same(question.text, given, question.answer)
        return self.same(given, question.answer)


def hold_out(rows: list[Any], amount: int | float, seed: int, purpose: str) -> tuple[list[Any], list[Any]]:
    """Divide rows by question into the rest and those held out, by the questions' number, seed and purpose only.

    Args:
        rows: things with a ``question``.
        amount: number of questions to take, or a share of them.
        seed: seed of the split.
        purpose: ``val`` or ``test``: the config key, and different ones choose independently.

    Raises:
        UserError: for more questions than there are.
    """
    asked = list(dict.fromkeys(row.question for row in rows))
    count = rows_of(amount, len(asked), f"data.{purpose}")
    chosen = {asked[i] for i in permutation(len(asked), seed, "split", purpose)[:count].tolist()}
    return [row for row in rows if row.question not in chosen], [row for row in rows if row.question in chosen]


def without(rows: list[Any], others: Iterable[Any], split: str) -> list[Any]:
    """Return the rows whose question, up to white space, is not among those of ``others``; log how many go.

    Args:
        rows: things with a ``question``, of ``data.path``.
        others: things with a ``question``, which rows must not share.
        split: split of the others, to name in the log and in the error.

    Raises:
        UserError: if none is left.
    """
    asked = {" ".join(other.question.split()) for other in others}
    kept = [row for row in rows if " ".join(row.question.split()) not in asked]
    if not kept:
        raise UserError(
            "data.path",
            (f"{len(rows)} rows, and none is left to train on without the questions of the {split} split"),
            "other questions than those",
        )
    if len(kept) < len(rows):
        left = len(rows) - len(kept)
        log.info("%d of %d rows left out of training: the %s split asks their questions", left, len(rows), split)
    return kept


def examples_data(
    name: str,
    examples: Mapping[str, Some[Example]],
    right: Right,
    form: str,
    rationale_weight: float,
    template: Template,
    complete: bool,
    **common: Unpack[TextCommon],
) -> TextData:
    """Build a data set of questions: those of ``train`` are learned, those of the other splits asked.

    So that forms can be compared, and a teacher of one can teach a student of another, a tokenizer that is made here
    is made of the same texts for all of them: of questions, reasoning and answers, whichever are learned.

    Args:
        name: name of the data set.
        examples: examples by split; empty splits are left out.
        right: judge of generated texts.
        form: form of the sequences.
        rationale_weight: weight of the second task, with form ``both``.
        template: the text around the parts.
        complete: learn from examples with reasoning and answer alone, so that all forms train on the same questions;
            else from all that have what the form needs (see :func:`learnable`).

    Raises:
        UserError: if no training example has what it needs.
    """
    needed = "steps" if complete else form
    train = [example for example in examples["train"] if learnable(example, needed)]
    if not train:
        raise UserError(
            "data.form",
            (f"{form}; none of {len(examples['train'])} training examples of {name} has what it needs"),
            (
                "examples with reasoning and answer, or with data.complete=false those with an "
                "answer (data.form=answer) or with one of the two (data.form=both)"
            ),
        )
    _tell(name, len(examples["train"]), train, form, needed)
    taught = train if complete else examples["train"]
    held = {"train": train, **{split: rows for split, rows in examples.items() if split != "train" and rows}}

    def read(tokenizer: Tokenizer) -> RawText:
        splits = {
            split: sequences(
                rows, tokenizer, form, template=template, rationale_weight=rationale_weight, ask=split != "train"
            )
            for split, rows in held.items()
        }
        return RawText(name, tokenizer, splits, right=right)

    def known() -> list[str]:
        whole = [text for rows in examples.values() for text in texts(rows, "steps", template)]
        golds = [row.gold or "" for rows in examples.values() for row in rows]
        return [template.alphabet, template.label, template.rationale, template.gap, *golds, *whole]

    return text_data(read, lambda: texts(taught, "steps", template), alphabet=known, **common)


def _tell(name: str, there: int, train: list[Example], form: str, needed: str) -> None:
    """Log how many examples are learned, where that is not plainly all of them, each as one sequence."""
    has = {"steps": "reasoning and answer", "answer": "an answer", "both": "reasoning or answer"}[needed]
    if len(train) < there:
        log.info("%s: %d of %d training examples have %s, and are learned", name, len(train), there, has)
    if form == "both":
        count = sum(bool(example.answer) + bool(example.reasoning) for example in train)
        log.info("%s: %d sequences of %d examples; twice data.batch_size for as many steps", name, count, len(train))
