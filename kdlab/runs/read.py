"""Readers of run folders: ``result.json``, ``config.yaml`` and ``curves.jsonl``.

Nothing here imports torch, and nothing in a run folder is executed. A folder may come from somebody else or
from a run that was killed, so every file may be missing, cut short or wrong; that costs a line of warning,
never a crash.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kdlab.errors import UserError, nearest
from kdlab.plain_text import one_line
from kdlab.runs.result import RESULT, load_result
from kdlab.system.files import Unreadable, read_json_lines, read_mapping

CONFIG, CURVES, SWEEP = "config.yaml", "curves.jsonl", "sweep.yaml"

DIAGNOSIS = "diagnosis.html"
"""Page that ``diagnose``, or a run of a classifier with a teacher, writes into the run folder."""

STORES = frozenset({"teachers", "baselines", "cache"})
"""Folders inside ``outputs`` that hold what runs share: part of no comparison, unless pointed at directly."""

TEMPERATURE, ALPHA = "loss.temperature", "loss.alpha"

_FIRST = (
    *("name", "method", "data", "data.form", "data.tokenizer"),
    *("teacher", "student", "batch_transform", "loss", TEMPERATURE, ALPHA),
)
"""Settings that people look for first, in this order; the others follow by name."""

_SHORT = {TEMPERATURE: "T", ALPHA: "alpha", "name": "experiment"}

_LONGEST_NAME = 200
"""Largest number of characters in the name of a curve."""

_PARTS = ("batch_transform", "adapter", "auxiliary")
"""Parts that a run may do without, and that a setting of their own name then calls none."""

_REFERENCES = ("teacher", "baseline")


@dataclass
class Run:
    """Finished or failed run: its folder, and the content of its ``result.json``."""

    folder: Path
    result: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    """Files that could not be read so far, beside ``result.json``; a line each."""

    @property
    def label(self) -> str:
        """Shortest name that still tells runs apart by eye: the folder's own."""
        return self.folder.name

    @property
    def failed(self) -> bool:
        """Whether the run did not finish."""
        return self.result.get("status") != "finished"

    @property
    def error(self) -> str:
        """The failure in one line; empty for a finished run."""
        if not self.failed:
            return ""
        return " ".join(str(self.result.get("error") or "failed without a message").split())

    @property
    def seed(self) -> Any:
        """Seed of the run."""
        return self.result.get("seed", self.settings.get("seed"))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The flat settings of the run, with the experiment's name and method beside them."""
        extra: dict[str, Any] = {key: self.result[key] for key in ("name", "method") if key in self.result}
        flat = {**extra, **mapping(self.result.get("settings"))}
        for part in _PARTS:
            # Its arguments are listed, and what they are of stands in the config alone.
            if part not in flat and any(key.startswith(f"{part}.") for key in flat):
                target = str(mapping(self.config.get(part)).get("_target_", "")).rpartition(".")[2]
                flat |= {part: target} if target else {}
        return flat

    @cached_property
    def models(self) -> dict[str, dict[str, Any]]:
        """Measured models by role: student, teacher, baseline and others; those not measured are left out."""
        return {str(k): v for k, v in mapping(self.result.get("models")).items() if isinstance(v, dict)}

    @property
    def subject(self) -> str:
        """The role of the model that this run was about: the student, or what was trained in its place."""
        others = [role for role in self.models if role not in _REFERENCES]
        return "student" if "student" in self.models or not others else others[0]

    def number(self, role: str, *path: str) -> float | None:
        """Return a number of one model, as in ``number("student", "test", "acc")``; None where there is none."""
        value: Any = self.models.get(role)
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return finite(value)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config; empty where ``config.yaml`` is missing, or (with a warning) cannot be read."""
        try:
            return read_mapping(self.folder / CONFIG)
        except FileNotFoundError:
            return {}
        except (OSError, Unreadable) as error:
            self.warnings.append(f"{self.folder / CONFIG}: cannot be read, not used ({error})")
            return {}

    @cached_property
    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """Map of curve name → (steps, values), by step; for a step written twice the later value counts.

        Lines that hold no point are passed over, with a warning that counts them.
        """
        points: dict[str, dict[float, float]] = {}
        left_out = 0
        for line in self._lines():
            if line is None or not is_point(line):
                left_out += 1
                continue
            step = float(line["step"])
            for name, value in line.items():
                if name != "step" and (number := finite(value)) is not None:
                    points.setdefault(name, {})[step] = number
        if left_out:
            verb = "line holds" if left_out == 1 else "lines hold"
            self.warnings.append(f"{self.folder / CURVES}: {left_out} {verb} no point of a curve, left out")
        ordered = {name: sorted(of_step.items()) for name, of_step in points.items()}
        return {name: ([s for s, _ in pairs], [v for _, v in pairs]) for name, pairs in ordered.items()}

    def _lines(self) -> Iterator[dict[str, Any] | None]:
        try:
            yield from read_json_lines(self.folder / CURVES)
        except FileNotFoundError:
            return
        except (OSError, Unreadable) as error:
            self.warnings.append(f"{self.folder / CURVES}: cannot be read, not drawn ({error})")


@dataclass
class Found:
    """Result of a search through folders: runs, unfinished folders and warnings."""

    runs: list[Run] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    """Folders with a config and no result: still running, or killed."""
    warnings: list[str] = field(default_factory=list)
    """One line for each file that could not be read."""

    @property
    def finished(self) -> list[Run]:
        """Runs that finished."""
        return [run for run in self.runs if not run.failed]

    @property
    def failed(self) -> list[Run]:
        """Runs that failed."""
        return [run for run in self.runs if run.failed]


def load(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Return the finished and failed runs under ``paths``: run folders, sweep folders, or trees of them.

    Raises:
        UserError: a path does not exist, or there is no result under any of them.
    """
    return scan(paths).runs


def scan(paths: Iterable[str | os.PathLike[str]]) -> Found:
    """Search ``paths`` as :func:`load` does, and return the unfinished folders and the warnings too."""
    roots = [Path(path) for path in paths]
    results, seen = Found(), set[Path]()
    for root in roots:
        try:
            there = root.exists()
        except ValueError:  # a NUL in the name
            there = False
        if not there:
            raise _missing(root)
        if not root.is_dir():
            root = root.parent
        for folder in _folders(root):
            if (real := folder.resolve()) not in seen:
                seen.add(real)
                _read(folder, results)
    if not results.runs:
        more = f"; {len(results.unfinished)} unfinished, as {results.unfinished[0]}" if results.unfinished else ""
        more += f"; {results.warnings[0]}" if results.warnings else ""
        where = ", ".join(map(str, roots)) or "nothing"
        raise UserError("compare", f"no {RESULT} under {where}{more}; give a run folder, a sweep, or a tree of them")
    return results


def is_point(line: Mapping[str, Any]) -> bool:
    """Return whether a line of ``curves.jsonl`` holds a step and numbers, where None stands for what was not finite."""
    numbers = all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in line.values()
    )
    return finite(line.get("step")) is not None and numbers and all(len(name) <= _LONGEST_NAME for name in line)


def mapping(value: object) -> dict[str, Any]:
    """Return ``value`` if it is a dict, else an empty one: a file may hold something else where a dict should be."""
    return value if isinstance(value, dict) else {}


def finite(value: object) -> float | None:
    """Return ``value`` as a float if it is a finite number, else None. True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def setting(value: object) -> str:
    """Format a setting as a person would write it.

    >>> setting(4.0), setting({"start": 8, "end": 1, "shape": "cosine"}), setting(["hinton", "fitnets"])
    ('4', '8→1 cosine', '[hinton, fitnets]')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(setting, value))}]"
    if not isinstance(value, Mapping):
        return one_line(value)
    if {"start", "end"} <= set(value) <= {"start", "end", "shape"}:
        return f"{setting(value['start'])}→{setting(value['end'])} {one_line(value.get('shape', ''))}".strip()
    rest = ", ".join(f"{one_line(k)}: {setting(v)}" for k, v in value.items() if k != "_target_")
    target = one_line(value.get("_target_", "")).rpartition(".")[2]
    return f"{target}({rest})" if target else f"{{{rest}}}"


class Stat(NamedTuple):
    """Mean over ``n`` runs, and their sample standard deviation where n is 2 or more."""

    mean: float
    std: float | None
    n: int


@dataclass
class Group:
    """Group of runs that differ in nothing but their seed."""

    settings: dict[str, Any]
    runs: list[Run]
    rank: int | None = None
    """Rank on validation, from 1 for the best; None where nothing was validated."""

    def stat(self, get: Callable[[Run], float | None]) -> Stat | None:
        """Return mean and deviation of ``get`` over the runs for which it gives a number."""
        values = [value for value in map(get, self.runs) if value is not None]
        return over(values)

    def label(self, keys: Iterable[str]) -> str:
        """Describe the group by the settings that matter, as in ``T=4 alpha=0.9``; by its folder's name if none do."""
        known = [f"{short(key)}={setting(self.settings[key])}" for key in keys if key in self.settings]
        return " ".join(known) or self.runs[0].label


def over(values: Sequence[float]) -> Stat | None:
    """Return mean and sample standard deviation of ``values``; None if there are none."""
    if not values:
        return None
    try:
        return Stat(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
    except OverflowError:  # of numbers that no measure has
        return None


def short(key: str) -> str:
    """Return a setting's name as a heading: T for ``loss.temperature``, ``lr`` for ``optimizer.lr``."""
    return _SHORT.get(key) or key.removeprefix("loss.").removeprefix("optimizer.").removeprefix("method.")


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the settings, seeds aside, in which the runs are not all alike, the most looked-for first."""
    names = {key for run in runs for key in run.settings} - {"seed"}
    mixed = [key for key in names if len({same(run.settings.get(key)) for run in runs}) > 1]
    return sorted(mixed, key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), key))


def same(value: object) -> str:
    """Return a string that equal settings share: 4 and 4.0 are one, True and 1 are not."""
    number = finite(value)
    return json.dumps(value if number is None else number, sort_keys=True, default=str)


def group(runs: Iterable[Run]) -> tuple[list[Group], list[Run]]:
    """Group finished runs by their settings, and return the groups and the repeats left out.

    A run repeated with the very same config and seed is no further sample: the later one counts. Runs that
    share settings and seed yet not their config differ in something unlisted: they are kept apart.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: same(value) for key, value in run.settings.items() if key != "seed"}
        by_settings.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    groups, repeats = [], list[Run]()
    for members in by_settings.values():
        latest: dict[tuple[str, str], Run] = {}
        for run in sorted(members, key=lambda r: (str(r.result.get("finished") or ""), r.folder)):
            key = (same(run.seed), str(run.result.get("config_hash") or run.folder))
            repeats += [latest[key]] if key in latest else []
            latest[key] = run
        kept = [run for run in members if any(run is one for one in latest.values())]
        together = len({same(run.seed) for run in kept}) == len(kept)
        for part in [kept] if together else [[run] for run in kept]:
            groups.append(Group({k: v for k, v in part[0].settings.items() if k != "seed"}, part))
    return groups, repeats


def _missing(root: Path) -> UserError:
    siblings: Sequence[str] = []
    if root.parent.is_dir():
        siblings = [entry.name for entry in root.parent.iterdir() if entry.is_dir()]
    close = nearest(root.name, siblings)
    hint = f"; nearest: {', '.join(str(root.parent / name) for name in close)}" if close else ""
    return UserError("compare", f"there is no folder {str(root)!r}{hint}")


def _folders(root: Path) -> Iterator[Path]:
    """Yield the run folders at or below ``root``, by path. What lies inside a run (stages, say) is part of it."""
    # A sweep's folder holds jobs, whatever else a launcher may have left in it.
    if not (root / SWEEP).exists() and ((root / RESULT).exists() or (root / CONFIG).exists()):
        yield root
        return
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        skipped = entry.name.startswith((".", "_")) or entry.name in STORES
        # Links are not followed: they could lead in circles, or show one run twice.
        if entry.is_dir(follow_symlinks=False) and not skipped:
            yield from _folders(Path(entry.path))


def _read(folder: Path, results: Found) -> None:
    try:
        result = load_result(folder)
    except (OSError, Unreadable) as error:
        results.warnings.append(f"{folder / RESULT}: damaged, left out ({error})")
        return
    if result is None:
        results.unfinished.append(folder)
    else:
        results.runs.append(Run(folder, result))
