"""The config groups and the options of each, read from the config folders without hydra.

An option is a YAML file; its first line is a comment that says what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import kdlab

NETWORKS = "model"
"""Group of networks: each is an option of ``student`` and of ``teacher`` as well."""

_COMMENT = 2_000
"""Maximum number of characters of a comment that are read."""

BOARDS = "leaderboard"
"""Folder of boards, which the verb of that name takes; no group of an experiment."""

EXTRA = {
    "teacher": {
        "none": "no teacher at all",
        "previous": "the student of the stage before, or of the generation before",
        "written": "answers in a cache alone, such as kdlab generate writes: teacher.cache=FOLDER",
    },
}
"""Options that are not files of their own."""


@dataclass(frozen=True)
class Options:
    """Options that can be chosen: group → option → its description."""

    folders: tuple[Path, ...]
    groups: dict[str, dict[str, str]]
    boards: dict[str, str] = field(default_factory=dict)

    def of(self, group: str) -> list[str]:
        """Return the names of a group's options; none for an unknown group."""
        return sorted(self.groups.get(group, ()))

    def file(self, group: str, option: str) -> Path | None:
        """Return the first file that defines an option."""
        for folder in self.folders:
            path = folder / group / f"{option}.yaml"
            if path.is_file():
                return path
        return None


def shipped() -> Path:
    """Return the config folder that comes with kdlab: inside the installed package, or beside it in a clone."""
    package = Path(kdlab.__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def folders(extra: Path | None = None) -> tuple[Path, ...]:
    """Return the folders that hold options, first match wins: an extra one, the user's ``./conf``, the shipped one."""
    own = Path.cwd() / "conf"
    wanted = [*([extra.resolve()] if extra else []), *([own.resolve()] if own.is_dir() else []), shipped()]
    return tuple(dict.fromkeys(wanted))


def read(where: Iterable[Path]) -> Options:
    """Read the names and first lines of all options."""
    where = tuple(where)
    groups: dict[str, dict[str, str]] = {}
    for folder in where:
        for path in filter(Path.is_file, sorted(folder.glob("*/[!_]*.yaml"))):  # _NAME is the base of other options
            groups.setdefault(path.parent.name, {}).setdefault(path.stem, _first_comment(path))
    networks = groups.get(NETWORKS, {})
    groups["student"] = dict(networks)
    groups["teacher"] = {**networks, **EXTRA["teacher"]}
    boards = groups.pop(BOARDS, {})
    return Options(where, {name: groups[name] for name in sorted(groups) if name != "hydra"}, boards)


def _first_comment(path: Path) -> str:
    """Return an option's description: the first comment line that is not Hydra's ``@package``."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        while line := lines.readline(_COMMENT):
            text = line.strip()
            if not text.startswith("#"):
                break
            if not text.lstrip("# ").startswith("@package"):
                return text.lstrip("# ")
    return ""
