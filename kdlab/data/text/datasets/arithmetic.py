"""Generated sums with their steps written out: a task on which reasoning pays, learned in minutes by small networks."""

from __future__ import annotations

from collections.abc import Sequence as Some
from typing import Unpack

from kdlab.data.text.answers import same_number
from kdlab.data.text.build import TextCommon
from kdlab.data.text.module import TextData
from kdlab.data.text.templates import TERSE, Example, Right, check_form, examples_data
from kdlab.errors import UserError, unknown
from kdlab.functional.rng import mix, seed_of
from kdlab.ranges import whole_number

SIGNS = {"add": "+", "sub": "-", "mul": "*"}
_ATTEMPTS = 200
_MULTIPLIERS = 9


class _Dice:
    """Pseudorandom whole numbers that are a function of a key, one after the other."""

    def __init__(self, *key: int | str) -> None:
        self._state = seed_of(*key)

    def __call__(self, n: int) -> int:
        """Draw a number in 0 .. n-1."""
        self._state = mix(self._state + 0x9E3779B97F4A7C15)
        return (self._state >> 16) % n


def chain(
    steps: int, *key: int | str, operations: Some[str] = ("add", "sub"), largest: int = 99, limit: int = 99
) -> Example | None:
    """Generate one sum, a function of the arguments: no operation leads below zero or above ``limit``.

    >>> chain(3, 0, "doctest", 1)
    Example(question='3+81-84+53', reasoning='3+81=84;84-84=0;0+53=53', answer='53', gold='53', group='3')

    Args:
        steps: operations in it.
        key: seed of the draws.
        operations: names out of ``add``, ``sub`` and ``mul``.
        largest: the largest number that is added or subtracted; factors go to 9. Small ones are learned sooner.
        limit: the largest number to start with, and the largest result.

    Returns:
        The example, with one step for each operation and their number as group; None where the numbers drawn leave no
        operation that is allowed.
    """
    draw = _Dice(*key)
    only_grows = set(operations) == {"mul"}
    result = 1 + draw(max(1, limit >> steps)) if only_grows else draw(limit + 1)
    question, reasoning, sum_so_far = str(result), [], False
    for left in reversed(range(steps)):
        room = limit >> left if only_grows else limit  # every factor to come is 2 at least
        most = {
            "add": min(largest, limit - result),
            "sub": min(largest, result),
            "mul": min(_MULTIPLIERS, room // result) if result else 0,
        }
        # a factor of 1, or adding nothing, would be no step
        possible = [name for name in operations if most[name] >= (2 if name == "mul" else 1)]
        if not possible:
            return None
        name = possible[draw(len(possible))]
        least = 2 if name == "mul" else 1
        operand = least + draw(most[name] - least + 1)
        if name == "mul" and sum_so_far:
            question, sum_so_far = f"({question})", False
        sum_so_far = sum_so_far or name != "mul"
        question += f"{SIGNS[name]}{operand}"
        before = result
        result = {"add": before + operand, "sub": before - operand, "mul": before * operand}[name]
        reasoning.append(f"{before}{SIGNS[name]}{operand}={result}")
    return Example(question, ";".join(reasoning), str(result), str(result), str(steps))


def arithmetic(
    operations: Some[str] = ("add", "sub"),
    min_steps: int = 2,
    max_steps: int = 6,
    largest: int = 9,
    limit: int = 99,
    train: int = 10_000,
    val: int = 500,
    test: int = 1_000,
    form: str = "steps",
    rationale_weight: float = 1.0,
    data_seed: int = 0,
    **common: Unpack[TextCommon],
) -> TextData:
    """Generate sums of several terms, with every intermediate result: ``37+58-21:37+58=95;95-21=74>74``.

    Each step needs only the one before it, so that a small network can learn to write them; to answer at once it would
    have to do all of them in one pass, the harder the more there are (see "chain of thought", Wei et al., NeurIPS 2022,
    and for why depth bounds what goes into one pass, Feng et al., NeurIPS 2023). The number of steps is the group of a
    question, and equally frequent. No question is there twice, in one split or in two. Questions are what Python reads
    them to be: parentheses stand around a sum that is multiplied. An example depends on ``data_seed``, its split and
    its place in it, so that test questions stay when ``train`` grows (unless two would coincide).

    Args:
        operations: names out of ``add``, ``sub`` and ``mul``.
        min_steps: least number of operations in a question.
        max_steps: greatest number of operations in a question.
        largest: the largest number that is added or subtracted; factors go to 9. Small ones are learned sooner.
        limit: the largest number to start with, and the largest result on the way; none is negative.
        train: number of training questions.
        val: number of validation questions.
        test: number of test questions.
        form: ``steps``, ``answer`` or ``both``; see :func:`kdlab.data.text.templates.sequences`.
        rationale_weight: weight of the second task, with form ``both``.
        data_seed: seed of the generator.

    The other arguments are :func:`text_data`'s, with ``context`` 96 and ``batch_size`` 32 unless given.
    ``ood: {_target_: kdlab.data.arithmetic, operations: [add, sub, mul]}`` measures on more operations than those
    trained on.

    Raises:
        UserError: for an option that makes no sense, or more questions than there are different ones.
    """
    check_form(form, rationale_weight)
    if isinstance(operations, str) or not operations or len(set(operations)) != len(operations):
        raise UserError("data.operations", f"{operations!r}", f"a list of different ones out of {list(SIGNS)}")
    for name in operations:
        if name not in SIGNS:
            raise unknown("data.operations", name, SIGNS, "operation")
    whole_number("data.min_steps", min_steps, 1)
    whole_number("data.max_steps", max_steps, min_steps)
    whole_number("data.largest", largest, 1)
    whole_number("data.limit", limit, 2)
    sizes = {"test": whole_number("data.test", test, 0), "val": whole_number("data.val", val, 0)}
    sizes["train"] = whole_number("data.train", train, 1)

    seen: set[str] = set()
    examples: dict[str, list[Example]] = {}
    for split, size in sizes.items():  # train comes last, and so changes nothing for the others
        examples[split] = []
        for index in range(size):
            steps = min_steps + index % (max_steps - min_steps + 1)
            example = _new(seen, steps, (data_seed, split, index), operations, largest, limit)
            if example is None:
                raise UserError(
                    f"data.{split}",
                    f"{size}; after {index} no new question of {steps} steps was found",
                    "fewer, a larger data.limit or data.largest, or more steps or operations",
                )
            examples[split].append(example)
    common.setdefault("context", 96)
    common.setdefault("batch_size", 32)
    right = Right(same_number, TERSE.marker)
    return examples_data("arithmetic", examples, right, form, rationale_weight, TERSE, complete=True, **common)


def _new(
    seen: set[str], steps: int, key: tuple[int | str, ...], operations: Some[str], largest: int, limit: int
) -> Example | None:
    """Generate the example of a key, drawn again while it has been seen; None if it always has."""
    for attempt in range(_ATTEMPTS):
        example = chain(steps, *key, attempt, operations=operations, largest=largest, limit=limit)
        if example is not None and example.question not in seen:
            seen.add(example.question)
            return example
    return None
