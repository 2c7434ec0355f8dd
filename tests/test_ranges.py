"""Numbers and the ranges that they may be in."""

import math

import pytest

from kdlab.errors import UserError
from kdlab.ranges import at_least_zero, positive, share, whole_number

ODD = [None, True, "1", [], math.nan]


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (whole_number, [1, 10**12], [0, -1, 1.0, 1.5]),
        (share, [0, 1, 0.5], [-0.1, 1.1, math.inf]),
        (positive, [1, 1e-300, 0.5], [0, -1, math.inf]),
        (at_least_zero, [0, 0.0, 7], [-1e-9, math.inf]),
    ],
)
def test_a_value_in_range_comes_back_and_any_other_is_named(check, fine, wrong):
    for value in fine:
        assert check("a.b", value) == value
    for value in [*wrong, *ODD]:
        with pytest.raises(UserError, match=r"^a\.b: .*; accepted: a ") as error:
            check("a.b", value)
        assert error.value.key == "a.b"


def test_ends_are_said():
    with pytest.raises(UserError, match=r"rank: 9; accepted: a whole number, from 2 to 8, or null"):
        whole_number("rank", 9, 2, 8, also="or null")
    with pytest.raises(UserError, match=r"p: 0; accepted: a number above 0 and below 1"):
        share("p", 0, zero=False, one=False)
    with pytest.raises(UserError, match=r"lr: 'x'; accepted: a finite number above 0"):
        positive("lr", "x")
