"""Is this answer right? Finding the answer in a generated text, and comparing it with the one that is known.

Nothing here raises on what a network writes: a text without an answer that can be read is a wrong one.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kdlab.data.text.numerals import LONGEST, joined, stated_number
from kdlab.data.text.numerals import number as number

MARKER = "####"
"""Marker before the final answer, as in GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems",
2021)."""

END = "<|endoftext|>"
"""Token that ends a text; anything a network writes after it does not count."""

Same = Callable[[str, str], bool]
"""Whether an answer (first) means the same as the right one (second)."""

_TOLERANCE = Fraction(1, 10**6)
_MOST = Fraction(1, 1000)
"""Greatest difference between numbers that count as equal, however large they are."""
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")", "$": None})
_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)e[-+]?\d+", re.IGNORECASE)
_MARKS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "−": "-"})
_AROUND = re.compile(r"""^(?:(?!(?<![.,])[.,]\d)[ .,;:!?"'`])+|[ .,;:!?"'`]+$""")
_LETTER = re.compile(r"[(\[]?([a-z])(?:[)\]]?|[)\].:]{1,2} (.+))")
"""Letter of a choice, alone or as the mark of the words behind it."""
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def extract(text: str, marker: str = MARKER) -> str | None:
    """Return the final answer of a text: the line after its last ``marker``; None where there is none.

    >>> extract("48/2 = 24 #### 24#### 72 <|endoftext|> and so on")
    '72'
    """
    _, mark, tail = text.partition(END)[0].rpartition(marker)
    answer = tail.strip().partition("\n")[0].strip() if mark else ""
    return answer or None


def normalise(text: str) -> str:
    """Remove what does not change an answer: case, width, runs of spaces, quotes and full stops around it.

    A point or comma before a digit stays, and a text of such marks alone stays as it is.

    >>> normalise('  "The  Bank". '), normalise(".5"), normalise(" ?")
    ('the bank', '.5', '?')
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_MARKS)
    text = " ".join(text.split())
    return _AROUND.sub("", text) or text


def same_text(given: str, answer: str) -> bool:
    """Return whether two answers are the same words."""
    return normalise(given) == normalise(answer)


def value(expression: str) -> Fraction | None:
    """Compute the exact value of an arithmetic expression of ``+ - * /`` and parentheses; None where it has none.

    Safe for anything that a network writes: it is parsed, never run, and has at most 200 characters and no powers, so
    that the numbers stay small.

    >>> value("( 84.0 / 2.0 )"), value("(1 / (3 - 3))"), value("2 ** 9"), value("__import__('os')")
    (Fraction(42, 1), None, None, None)
    """
    text = joined(expression.translate(_SIGNS)).strip(" \n").rstrip(".")
    if len(text) > LONGEST or not re.fullmatch(r"[0-9.+\-*/() ]+", text):
        return None
    try:
        text = _ZEROS.sub("", text)
        return _evaluate(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(text[node.col_offset : node.end_col_offset])  # as written: a float would round it
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _evaluate(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(left, text), _evaluate(right, text))
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def _close(given: Fraction | None, answer: Fraction | None) -> bool:
    if given is None or answer is None:
        return False
    if given.denominator == answer.denominator == 1:
        return given == answer
    return abs(given - answer) <= min(_TOLERANCE * max(Fraction(1), abs(answer)), _MOST)


def same_number(given: str, answer: str) -> bool:
    """Return whether the last numbers of two answers are equal: whole numbers exactly, others to a millionth.

    What is written with digits but is no number that can be read (``10:30``, ``1,23``, ``2^10``, a sum) is compared as
    words.

    >>> same_number("$1,000.0 in all", "1e3"), same_number("at 10:30", "30"), same_number("10:30.", "10:30")
    (True, False, True)
    """
    mine, right = stated_number(given), stated_number(answer)
    if mine is None and right is None:
        return any(c.isdigit() for c in answer) and same_text(given, answer)
    return _close(mine, right)


def same_value(given: str, answer: str) -> bool:
    """Return whether two arithmetic expressions have equal values, within the tolerance of :func:`same_number`.

    A division by zero equals nothing.

    >>> same_value("(40 + 2)", "( 84.0 / 2.0 )"), same_value("84 / 0", "( 84.0 / 0.0 )")
    (True, False)
    """
    return _close(_worth(given), _worth(answer))


def _worth(text: str) -> Fraction | None:
    """Return the value of an expression, or of a number with an exponent."""
    return stated_number(text) if _EXPONENT.fullmatch(text.strip().rstrip(".")) else value(text)


def choice(given: str, choices: Sequence[str]) -> str | None:
    """Return the choice that an answer gives by its very words, its letter alone, or both; None for anything else.

    >>> choice("(b)", ["park", "gravity"]), choice("B. Gravity", ["park", "gravity"])
    ('gravity', 'gravity')
    >>> choice("It is not gravity.", ["park", "gravity"]), choice("b: a park", ["park", "gravity"])
    (None, None)
    """
    text = normalise(given)
    for option in choices:
        if normalise(option) == text:
            return option
    letter = _LETTER.fullmatch(text)
    if letter is None or (place := ord(letter[1]) - ord("a")) >= len(choices):
        return None
    return choices[place] if letter[2] in (None, normalise(choices[place])) else None


def named(sentence: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a sentence names: that of :func:`choice`, or the only one mentioned; None if unclear.

    Too lenient for an answer, since what is named may be denied.

    >>> named("Only a park has trees.", ["park", "gravity"]), named("A park or gravity.", ["park", "gravity"])
    ('park', None)
    """
    if (chosen := choice(sentence, choices)) is not None:
        return chosen
    text = normalise(sentence)
    mentioned = {normalise(option) for option in choices if _mentions(text, normalise(option))}
    if len(mentioned) != 1:
        return None
    return next(option for option in choices if normalise(option) in mentioned)


def _mentions(text: str, words: str) -> bool:
    """Return whether a text holds these words, and not as a part of a word or decimal number."""
    return re.search(rf"(?<!\w)(?!(?<=\.)\d){re.escape(words)}(?!\w|\.\d)", text) is not None


@dataclass(frozen=True)
class Choices:
    """Comparison of answers to questions with choices.

    Args:
        of: the choices of every question, by its text.
    """

    of: Mapping[str, Sequence[str]]

    def same(self, question: str, given: str, answer: str) -> bool:
        """Return whether ``given`` means the choice ``answer`` of this question."""
        chosen = choice(given, self.of.get(question, (answer,)))
        return chosen is not None and same_text(chosen, answer)


def without_calculator(text: str) -> str:
    """Remove GSM8K's calculator marks from a text.

    >>> without_calculator("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _CALCULATOR.sub("", text)


def operations(expression: str) -> int:
    """Count the operations of an arithmetic expression; signs of numbers are none.

    >>> operations("( ( 17.0 + 15.0 ) - -2.0 )")
    2
    """
    return len(re.findall(r"(?<=[\d)])\s*[-+*/]", expression))


def steps(reasoning: str) -> int:
    """Count the steps of a reasoning: results written down (``=``), or where there are none, lines and sentences.

    >>> steps("37+58=95;95-21=74"), steps("It must be a place. Only the bank is one."), steps("")
    (2, 2, 0)
    """
    text = without_calculator(reasoning)
    return text.count("=") or len([part for part in re.split(r"\n|(?<=[.!?])\s", text) if part.strip()])
