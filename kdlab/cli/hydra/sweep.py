"""Folders of a sweep: found again by what was asked, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdlab.config import builder
from kdlab.errors import UserError
from kdlab.runs.chosen_folder import refuse_others
from kdlab.runs.read import finite, mapping
from kdlab.runs.result import load_result
from kdlab.system.files import Unreadable, read_mapping, write_text

LONGEST = 90
"""Largest number of characters of a job folder's name before its hash."""

WRITABLE = "a folder that can be written to"


def sweep_folder(config: Mapping[str, Any], texts: Sequence[str], searched: bool = False) -> Path:
    """Return the folder of a sweep, named by a hash of its overrides in any order.

    Hydra's own settings do not count: a parallel launcher goes on where a serial one stopped, and a search
    with more trials where the one with fewer ended. A search and a grid of the same values are two sweeps.
    """
    kept = _asked(texts)
    digest = hashlib.sha256("\n".join([*kept, "search" * searched]).encode()).hexdigest()[:8]
    return Path(str(config.get("output") or "outputs")) / str(config.get("name") or "kdlab") / f"sweep-{digest}"


def _asked(texts: Sequence[str]) -> list[str]:
    """Return the overrides that identify a sweep, sorted, since their order does not count."""
    return sorted(text for text in texts if not text.startswith(("hydra.", "hydra/", "output=", "resume=")))


def check_sweep_folder(folder: Path, texts: Sequence[str]) -> None:
    """Check that a folder that the user named is free, or this sweep's already.

    Raises:
        UserError: if it holds anything else.
    """
    key = "hydra.sweep.dir"
    if not (folder / "sweep.yaml").exists():
        refuse_others(key, folder)
        return
    try:
        record = read_mapping(folder / "sweep.yaml")
    except (OSError, Unreadable) as error:
        raise UserError(key, f"{folder / 'sweep.yaml'} cannot be read ({error})", "a new folder") from None
    there = _asked([str(text) for text in record.get("overrides") or []])
    if there != _asked(texts):
        raise UserError(
            key,
            f"{folder} holds another sweep ({' '.join(there)})",
            "a new folder, an empty one, or that of the same sweep",
        )


def job_folder(sweep: Path, texts: Sequence[str], swept: Sequence[str], config: Mapping[str, Any]) -> Path:
    """Return one job's folder, named by its swept values in words and a hash of its whole config.

    A config that changed since (an edited file) gets a folder of its own, and never another's checkpoints.
    """
    own = sorted(t.lstrip("+") for t in texts if t.lstrip("+").split("=")[0] in swept)
    words = re.sub(r"[^\w.=,+-]+", "_", ",".join(own)).strip("_,")[:LONGEST] or "job"
    return sweep / f"{words}-{builder.config_hash(config)[:6]}"


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before the time is spent that leads up to its first file; writes nothing.

    Raises:
        UserError: names the folder or file that is in the way.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError("output", f"{folder}: {there} is no folder", WRITABLE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("output", f"{folder}: {there} cannot be written to", WRITABLE)


def write_record(sweep: Path, texts: Sequence[str], jobs: Sequence[str]) -> None:
    """Write ``sweep.yaml``: what was asked, and the folders that answer it.

    Raises:
        UserError: if the folder cannot be written to.
    """
    text = yaml.safe_dump({"overrides": list(texts), "jobs": list(jobs)}, sort_keys=False)
    try:
        sweep.mkdir(parents=True, exist_ok=True)
        write_text(sweep / "sweep.yaml", text)
    except OSError as error:
        raise UserError("output", f"{sweep}: {error.strerror}", WRITABLE) from None


def jobs_in(sweep: Path) -> list[Path]:
    """Return the folders of a sweep's jobs, begun or done, but not those of a launcher or a comparison."""
    folders = {path.parent for name in ("config.yaml", "result.json") for path in sweep.glob(f"*/{name}")}
    return sorted(folder for folder in folders if not folder.name.startswith("."))


def read_any(folder: Path) -> dict[str, Any]:
    """Return the ``result.json`` of a run, finished or failed; empty if it is missing or damaged."""
    try:
        return load_result(folder) or {}
    except (OSError, Unreadable):
        return {}


def objective(result: Mapping[str, Any]) -> float | None:
    """Return the objective of a search: the student's score on validation data; None if there is none."""
    return finite(result.get("objective"))


def greater(sweep: Path) -> bool | None:
    """Return whether a greater objective is better, as the finished jobs of a sweep say; None while there is none."""
    for path in sorted(sweep.glob("*/result.json")):
        result = read_any(path.parent)
        if result.get("status") == "finished":
            score = result.get("score")
            return not (isinstance(score, Mapping) and score.get("greater") is False)
    return None


def expected(config: Mapping[str, Any], jobs: int) -> str:
    """Return the expected duration of ``jobs`` runs, in words, from runs of the same name that are done."""
    folder = Path(str(config.get("output"))) / str(config.get("name"))
    spent = [seconds for path in folder.glob("**/result.json") if (seconds := _seconds(path.parent))]
    if not spent:
        return f"unknown for {jobs} job(s): no run in {folder} has finished yet"
    each = sum(spent) / len(spent)
    return f"about {duration(each * jobs)} for {jobs} job(s): {len(spent)} before took {duration(each)} each"


def remaining(sweep: Path, total: int, parallel: int) -> str:
    """Return the expected duration of the rest of a sweep, in words, from its jobs that are done; "" before."""
    spent = [seconds for path in sweep.glob("*/result.json") if (seconds := _seconds(path.parent))]
    left = total - len(spent)
    return f"about {duration(sum(spent) / len(spent) * left / parallel)} left" if spent and left > 0 else ""


def _seconds(folder: Path) -> float | None:
    result = read_any(folder)
    return finite(mapping(result.get("seconds")).get("total")) if result.get("status") == "finished" else None


def duration(seconds: float) -> str:
    """Return a time in words: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
