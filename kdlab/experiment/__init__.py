"""Run of one experiment, from its configuration to its run folder. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "run": "kdlab.experiment.runner",
    "evaluate_teacher": "kdlab.experiment.evaluation",
    "preflight": "kdlab.experiment.checks",
    "unread": "kdlab.experiment.reading",
    "Experiment": "kdlab.experiment.schema",
}
"""Map of public name → the module it comes from."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdlab.experiment' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
