"""Base of the terms on softened logits."""

from __future__ import annotations

from collections.abc import Mapping

from kdlab.functional import (
    Schedule,
)
from kdlab.losses.temperature import Temperature
from kdlab.losses.temperature import temperature as to_temperature
from kdlab.losses.term import Role, Term


class SoftTerm(Term):
    """Base of the terms on softened outputs.

    Args:
        weight: see :class:`~kdlab.losses.Term`.
        temperature: its own temperature; None takes the one that the objective shares among its terms (1 outside one).
    """

    role: Role = "soft"
    rowwise = True

    def __init__(
        self,
        weight: float | Mapping | Schedule = 1.0,
        temperature: float | Mapping | Schedule | Temperature | None = None,
    ) -> None:
        super().__init__(weight)
        self.shares_temperature = temperature is None
        self.temperature = to_temperature(1.0 if temperature is None else temperature)
