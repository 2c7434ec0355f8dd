"""Distillation from a trained teacher that does not change."""

from __future__ import annotations

from typing import Any

from kdlab.errors import UserError
from kdlab.methods.method import Method


class OfflineKD(Method):
    """Method that learns from labels and from a frozen teacher, live or cached.

    Rows without a label count for the soft targets alone, so a partly labelled set needs nothing further. Hinton,
    Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, NIPS 2014 workshop.

    Args:
        **shared: arguments of :class:`~kdlab.methods.Method`; ``teacher`` is required.

    Raises:
        UserError: without a teacher.
    """

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        if self.teacher is None:
            raise UserError("teacher", f"none, and {type(self).__name__} learns from one", "teacher=NAME")
