"""Answers are compared by what they mean: numbers by value, texts by their words, and nothing by its last digits."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from kdlab.data.text.answers import choice, extract, named, number, same_number, same_text, same_value
from kdlab.data.text.numerals import is_number, stated_number
from kdlab.data.text.sequence import Question
from kdlab.data.text.templates import Right
from kdlab.traces.pipeline import is_right
from kdlab.traces.prompts import Prompt

EQUAL = [
    ("1e5", "100000"), ("1E+5", "100,000"), ("1.5e-3", "0.0015"), ("10^3", "1000"), ("1.5×10^3", "1500"),
    ("1.5 \\times 10^{3}", "1500"), ("10²", "100"),
    (".5", "0.5"), ("-.5", "-0.5"), ("5.", "5"), ("5...", "5"), ("...5", "5"), ("42.Then", "42"), ("007", "7"),
    ("-0", "0"), ("+5", "5"), ("−5", "-5"), ("–5", "-5"), ("minus 5", "-5"), ("- 5", "5"),
    ("1/2", "0.5"), ("½", "0.5"), ("3½", "3.5"), ("5 1/2", "5.5"), ("-5 1/2", "-5.5"), ("\\frac{3}{4}", "0.75"),
    ("50%", "50"), ("50 %", "50"), ("$1,234.00", "1234"), ("€5", "5"), ("-$5", "-5"), ("$-5", "-5"), ("US$5", "5"),
    ("USD 100", "100"), ("Rs.500", "500"), ("5 €", "5"),
    ("1,000", "1000"), ("1 000", "1000"), ("1\u202f000", "1000"), ("1'000", "1000"), ("1,00,000", "100000"),
    ("1{,}000", "1000"), ("5k", "5000"), ("5 million", "5000000"), ("2.5 thousand miles", "2500"),
    ("5 apples", "5"), ("5km/h", "5"), ("5-year-old", "5"), ("5th", "5"), ("50 m²", "50"), ("50 m2", "50"),
    ("**42**", "42"), ("$\\boxed{42}$", "42"), ("x = 42", "42"), ("3 + 4 = 7", "7"), ("3 of 4", "4"),
    ("１２", "12"), ("٣", "3"), ("0.1", "0.1000000001"), ("3.0000001", "3"), ("1e400", "1e400"),
    ("10:30", "10:30."), ("1e999999999", "1e999999999"),
]  # fmt: skip
UNEQUAL = [
    ("1e5", "2e5"), ("1e5", "5"), ("1e-5", "-5"), ("1e5e5", "5"), ("1e999999999", "1"), ("1e1000", "1e1001"),
    (".5", "5"), ("−5", "5"), ("minus 5", "5"), ("-€5", "5"),
    ("1/2", "2"), ("1/0", "0"), ("1/2/3", "3"), ("3½", "31/2"), ("\\frac{3}{4}", "4"), ("2/3", "3"),
    ("1,234", "234"), ("1,23", "23"), ("1.234.567", "567"), ("1 000", "0"), ("1,2,3", "3"), ("1_000", "0"),
    ("10:30", "30"), ("2^10", "10"), ("2^10", "1024"), ("10²", "2"), ("√2", "2"), ("\\sqrt{2}", "2"),
    ("B12", "12"), ("COVID-19", "19"), ("0x1F", "1"), ("12abc34", "34"), ("2x3", "3"), ("5'6\"", "6"),
    ("10-12", "12"), ("10 - 12", "12"), ("3 + 4", "4"), ("3+4", "4"), ("4 + x", "4"), ("10 minus 5", "5"),
    ("2024-01-05", "5"), ("5k", "5"), ("5 million", "5"),
    ("12345678901234567890123", "12345678901234567890124"), ("10000000", "10000001"), ("1234567.5", "1234567"),
    ("0.1", "0.10001"), ("", ""), ("none", "none"), ("nan", "nan"), ("inf", "inf"), ("none", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "answer"), EQUAL)
def test_numbers_of_one_value_are_the_same(given, answer):
    assert same_number(given, answer) and same_number(answer, given)


@pytest.mark.parametrize(("given", "answer"), UNEQUAL)
def test_what_is_not_of_one_value_is_not_the_same(given, answer):
    assert not same_number(given, answer) and not same_number(answer, given)


@pytest.mark.parametrize(
    ("given", "answer", "same"),
    [
        (".5", "5", False), (",5", "5", False), ("'.5'", ".5", True), ("...5", "5", True), ("5.", "5", True),
        ("?", "!", False), ("?", "?", True), ("", "?", False), ("...", ".", False), ("#", "", False),
        ("-5", "−5", True), ("-5", "5", False), ("“yes”", "Yes!", True), ("?yes", "yes", True), ("it’s", "it's", True),
    ],
)  # fmt: skip
def test_words(given, answer, same):
    assert same_text(given, answer) == same_text(answer, given) == same


@pytest.mark.parametrize(
    ("given", "answer", "same"),
    [
        ("1e5", "100000", True), ("08", "8", True), ("0.10", "0.1", True), ("100", "1", False),
        ("10.05", "10.5", False),
        ("123456789012345678.5", "123456789012345678.25", False), ("10000001", "10000000", False), (".5", "5", False),
        ("1e999999999", "1e999999999", False), ("1234,5 + 0", "1239", False),
    ],
)  # fmt: skip
def test_expressions(given, answer, same):
    assert same_value(given, answer) == same


def test_solutions_that_end_as_those_of_gsm8k():
    text = "The bill is 1,000 + 234 = <<1000+234=1234>>1,234 dollars.\n#### 1,234"
    assert extract(text) == "1,234" and number(text) == 1234
    judge, asked = Right(same_number), Question(prompt=None, answer="1,234", text="How much?")
    assert all(judge(asked, f"#### {said}") for said in ("1234", "$1,234.00", "1.234e3", "1234 dollars."))
    assert not any(judge(asked, f"#### {said}") for said in ("234", "1,23", "1.234", "1000+1234", "9:1234", ""))


def test_a_part_of_a_sum_is_a_last_number_and_no_answer():
    assert number("82-19") == 19 and stated_number("82-19") is None
    assert number("so it is 82-19 = 63") == stated_number("so it is 82-19 = 63") == Fraction(63)


def test_choices_that_are_numbers():
    assert named("it is .5", ["5", ".5"]) == choice(".5", ["5", ".5"]) == ".5"
    assert named("it is 5.", ["5", ".5"]) == "5"


@pytest.mark.parametrize(
    ("given", "gold", "right"),
    [
        ("100000", "1e5", True), ("0.5", "1/2", True), ("it is -5", "−5", True), ("1,000", "1000", True),
        ("5", "B5", False), ("b5.", "B5", True), ("30", "10:30", False), ("5", "5pm", False),
        ("12", "12 apples", False),
    ],
)  # fmt: skip
def test_answers_of_teachers_are_judged_alike(given, gold, right):
    assert is_right(given, Prompt("key", "q", gold=gold)) == right
    assert is_number(gold) == (gold in ("1e5", "1/2", "−5", "1000"))


@pytest.mark.parametrize(
    "text", ["1 ", "1,", "1'", "1-2", "10^", "1e", "a-", "$ ", "-", ".", "(", " 123", "\\frac{", "½"]
)
def test_long_answers_cost_little(text):
    started = time.perf_counter()
    same_number(text * 20_000, "5")
    same_text(text * 20_000, "5")
    assert time.perf_counter() - started < 3
