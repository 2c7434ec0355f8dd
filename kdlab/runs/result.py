"""Reading of ``result.json``, the result of a run or of a kept network, with its types checked. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdlab.config.renamed import with_current_names
from kdlab.system import integrity
from kdlab.system.files import Unreadable, read_json
from kdlab.system.integrity import RESULT

log = logging.getLogger("kdlab")


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _times(value: object) -> bool:
    return _number(value) or (isinstance(value, dict) and all(one is None or _number(one) for one in value.values()))


def _models(value: object) -> bool:
    return isinstance(value, dict) and all(one is None or isinstance(one, dict) for one in value.values())


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("config_hash", "trained_on"), (lambda value: isinstance(value, str), "a text")),
    **dict.fromkeys(
        ("error", "name", "method", "data", "teacher_trained_on", "started", "finished", "commit"),
        (lambda value: value is None or isinstance(value, str), "a text"),
    ),
    **dict.fromkeys(("settings", "hardware", "versions", "val"), (lambda value: isinstance(value, dict), "a mapping")),
    **dict.fromkeys(("best_epoch", "epochs", "steps", "format"), (_number, "a number")),
    "models": (_models, "a mapping of mappings"),
    "seconds": (_times, "numbers"),
    "objective": (lambda value: value is None or _number(value), "a number"),
    "score": (lambda value: isinstance(value, dict) and isinstance(value.get("name"), str), "a mapping with a name"),
    "overrides": (_texts, "a list of texts"),
}
"""Map of entry → (check of its value, accepted values in words); entries may be missing in older versions."""


def load_result(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``result.json`` of a run that finished or failed; None where there is no such file.

    Raises:
        OSError: if it is there and cannot be read.
        Unreadable: if it is no result of a run, or an entry has a type that it cannot have.
    """
    try:
        result = read_json(folder / RESULT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(result, dict) or not isinstance(result.get("status"), str):
        raise Unreadable("not the result of a run: no 'status' in it")
    for entry, (fits, accepted) in _KINDS.items():
        if entry in result and not fits(result[entry]):
            raise Unreadable(f"{entry} is {type(result[entry]).__name__}; accepted: {accepted}")
    if result["status"] == "finished":
        for entry in ("trained_on", "seconds") if "trained_on" in result else ("config_hash", "models"):
            if entry not in result:
                raise Unreadable(f"finished, and has no {entry}")
    if why := integrity.damage(result):
        raise Unreadable(why)
    return _by_current_names(result)


def _by_current_names(result: dict[str, Any]) -> dict[str, Any]:
    """Rename the settings and splits of an earlier version's result to the current names."""
    if "settings" in result:
        result["settings"] = with_current_names(result["settings"])
    for measured in (result.get("models") or {}).values():
        if measured and "outside" in measured:
            measured["ood"] = measured.pop("outside")
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run; None if it is unfinished or failed, or (with a warning) damaged."""
    try:
        result = load_result(folder)
    except (OSError, Unreadable) as error:
        log.warning("%s: damaged, and not used (%s)", folder / RESULT, error)
        return None
    return result if result is not None and result["status"] == "finished" else None
