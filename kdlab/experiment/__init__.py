"""Floor 4: runs one experiment, from its configuration to its run folder. Importing this imports no torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_LAZY = {
    "run": "kdlab.experiment.run",
    "evaluate_teacher": "kdlab.experiment.measuring",
    "preflight": "kdlab.experiment.preflight",
    "unread": "kdlab.experiment.reading",
    "Experiment": "kdlab.experiment.schema",
}
"""Public name → the module it comes from."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdlab.experiment' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """``run`` and ``preflight`` are functions here, whoever imports the modules of those names, and when."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
