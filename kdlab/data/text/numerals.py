"""Numbers as people and networks write them, read by their value.

The last number of a text is found as a whole or not at all: of ``10:30``, ``1,23`` or ``2^10`` no digits are taken for
the rest. Values are exact fractions, so that no number is too large to be told from its neighbour.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST = 200
"""Maximum number of characters of a number or expression that is read."""

_POWERS = 3
"""Maximum number of digits of an exponent that is read: 1e999999999 would fill the memory."""

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "‒": "-", "‐": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "∕": "/",
    "’": "'", "٫": ".", "٬": ",",
})  # fmt: skip
_VULGAR = re.compile(r"(?<=\d)(?=[¼½¾⅐-⅞])")
_SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴-⁹]+")
_SIGN = r"[$£¥¢฿₠-⃀]"
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), becomes)
    for pattern, becomes in (
        # LaTeX
        (r"\\(?:times|cdot)(?![a-z])", "*"),
        (r"(?<=\d)(?:\{,\}|\\,)(?=\d{3})", ","),
        (r"([-+]?)\\[dt]?frac\s?\{(\d+)\}\s?\{(\d+)\}", r" \1\2/\3 "),
        # currency; the sign may stand on either side of it
        (rf"\b(?:us|au|ca|nz|hk|a|c|s|r)(?={_SIGN})", ""),
        (rf"([-+]?)\\?{_SIGN}\s?([-+]?)(?=[\d.])", r" \1\2"),
        (_SIGN, " "),
        (r"\b(?:usd|eur|gbp|inr|chf|jpy|cny|rm|rs\.?)\s?(?=\d)", " "),
        # powers of ten
        (r"(?<=\d)\s?[x*]\s?10\s?(?:\^|\*\*)\s?[({]?\s?([-+]?\d+)\s?[)}]?", r"e\1"),
        (r"(?<![\w.,^])10(?:\^|\*\*)[({]?([-+]?\d+)[)}]?", r"1e\1"),
        # 12 345 678 and 3 / 4
        (r"(?<![\w.,:'/^*-])\d{1,3}(?: \d{3})+(?![\w:'/^])", "GROUPED"),
        (r"(?<=\d) ?/ ?(?=\d)", "/"),
        (r"\b(?:minus|negative)\s(?=\.?\d)", "-"),
    )
)
_TOKEN = re.compile(
    r"(?P<word>[^\W\d_](?:\w|[-.'](?=\w)|\^-?(?=\d))*|_\w*)"  # COVID-19, m2, x_1: a name, whatever digits it has
    r"|(?P<number>(?:(?<![\d)\]}])[-+])?(?:(?<!\.)\.)?\d(?:\w|[.,:'](?=\d)|[-+*/^]+(?=[\w.({]))*)"
)
_UNIT = r"(?:(?:[kcdm]?m|s|in|ft|yd|mi)\^?-?[23]|(?!x\d)[^\W\d_]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)
    (?: (?P<over>\d+)/(?P<under>\d+)
      | (?P<whole> \d{{1,3}}(?:,\d{{2,3}})*,\d{{3}} | \d{{1,3}}(?:'\d{{3}})+ | \d+ )?
        (?:\.(?P<part>\d+))?
        (?:e(?P<power>[-+]?\d+))?
    )
    (?P<unit>(?:[-/]?{_UNIT}(?:[-/*]{_UNIT})*)?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"k": 3, "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(r"[\s-]?(hundred|thousand|million|billion|trillion)\b", re.IGNORECASE)
_OPERATOR_BEFORE = re.compile(r"[\d)\]}]\s?(?:[-+*/^]\s?)+$|(?:√|\\sqrt)\s?[({]?$")
_OPERAND_BEFORE = re.compile(r"[\d)\]}]\s?$")
_PLUS_AFTER = re.compile(r"\s?\+\s?[\w(.]|\^")


def number(text: str) -> Fraction | None:
    """Return the last number in a text, of a sum ``82-19`` its last one; None if there is none or it cannot be read.

    Thousands may be separated (``1,000``, ``1 000``, ``1'000``). Currency, percent signs and units do not count;
    ``k``, ``thousand``, ``million`` and so on do, as do exponents, fractions (``3/4``, ``2 1/2``) and signs.

    >>> number("she has $1,234.50 left."), number("1.5e-3"), number("2 million people")
    (Fraction(2469, 2), Fraction(3, 2000), Fraction(2000000, 1))
    >>> number("at 10:30"), number("none")
    (None, None)
    """
    return _last(text)[0]


def stated_number(text: str) -> Fraction | None:
    """Return :func:`number` of a text, but None where that is a part of a sum, range or root rather than an answer.

    >>> stated_number("12 + 5 = 17"), stated_number("12 + 5"), stated_number("10-12")
    (Fraction(17, 1), None, None)
    """
    last, part = _last(text)
    return None if part else last


def is_number(text: str) -> bool:
    """Return whether a text is one number and nothing else, but for currency, a percent sign and a full stop.

    >>> is_number("$1,000.00"), is_number("1e5"), is_number("12 apples"), is_number("5pm")
    (True, True, False, False)
    """
    plain = _plain(text).strip()
    match = _TOKEN.match(plain)
    if match is None or plain[match.end() :].strip(" .%") or stated_number(plain) is None:
        return False
    read = _NUMBER.fullmatch(match[0])
    return read is None or not read["unit"]


def joined(text: str) -> str:
    """Remove the commas between thousands from a text.

    >>> joined("(1,200 + 1,2)")
    '(1200 + 1,2)'
    """
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)


def _plain(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0], _VULGAR.sub(" ", text))
    text = unicodedata.normalize("NFKC", text).translate(_CHARACTERS)
    for pattern, becomes in _REWRITES:
        text = pattern.sub((lambda match: match[0].replace(" ", "")) if becomes == "GROUPED" else becomes, text)
    return text


def _last(text: str) -> tuple[Fraction | None, bool]:
    """Return the last number, and whether it is a part of something larger."""
    text = _plain(text)
    numbers = [match for match in _TOKEN.finditer(text) if match.lastgroup == "number"]
    if not numbers:
        return None, False
    last = numbers[-1]
    before, after, written = text[: last.start()], text[last.end() :], last[0]
    part = _OPERATOR_BEFORE.search(before[-8:]) is not None or _PLUS_AFTER.match(after) is not None
    part = part or (written[0] in "+-" and _OPERAND_BEFORE.search(before[-2:]) is not None)  # 10 -5
    value = _read(written)
    if value is None and (tail := re.fullmatch(r".*[-+*](?=[\d.])([^-+*/^]+)", written)):
        part, value = True, _read(tail[1])
    if value is None:
        return None, part
    if "/" in written and 0 <= value < 1 and len(numbers) > 1 and text[numbers[-2].end() : last.start()] == " ":
        whole = numbers[-2]
        if re.fullmatch(r"-?\d{1,9}", whole[0]) and not _OPERATOR_BEFORE.search(text[: whole.start()][-8:]):
            count = int(whole[0])  # 2 1/2
            return (count - value if whole[0].startswith("-") else count + value), False
    if (scale := _SCALE.match(after)) is not None:
        value *= 10 ** _SCALES[scale[1].lower()]
    return value, part


def _read(written: str) -> Fraction | None:
    """Return the value of a text that is one number with perhaps a unit; None for anything else."""
    match = _NUMBER.fullmatch(written) if len(written) <= LONGEST else None
    if match is None or not (match["over"] or match["whole"] or match["part"]):
        return None
    if match["over"]:
        if not int(match["under"]):
            return None
        value = Fraction(int(match["over"]), int(match["under"]))
    else:
        power = match["power"] or "0"
        if len(power.lstrip("+-").lstrip("0")) > _POWERS:
            return None
        whole, part = re.sub(r"[,']", "", match["whole"] or ""), match["part"] or ""
        value = Fraction(int(whole + part)) * Fraction(10) ** (int(power) - len(part))
    value *= 10 ** _SCALES.get(match["unit"].lower(), 0)
    return -value if match["sign"] == "-" else value
