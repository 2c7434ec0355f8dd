"""kdlab: train a small student from a large teacher, and compare every way of doing so.

Importing this imports nothing heavy; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from kdlab.errors import RunFailed, UserError

__version__ = "0.1.0"

_LAZY = {
    "distill": "kdlab.experiment.distill",
    "Batch": "kdlab.functional",
    "Outputs": "kdlab.functional",
    "Objective": "kdlab.losses",
    "Term": "kdlab.losses",
}
"""Public name → the module it comes from."""

__all__ = ["Batch", "Objective", "Outputs", "RunFailed", "Term", "UserError", "__version__", "distill"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdlab' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
