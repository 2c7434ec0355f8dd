"""The verbs: a module each, with ``main(argv) -> int``; its docstring's first line is its help."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path


@cache
def names() -> list[str]:
    """Return the names of all verbs, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def summaries() -> dict[str, str]:
    """Return verb → what it does, read without importing it."""
    folder = Path(__file__).parent
    docs = {name: ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) for name in names()}
    return {name: (doc or "").splitlines()[0].rstrip(".") for name, doc in docs.items()}
