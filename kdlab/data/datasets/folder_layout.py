"""Folders of pictures: which are splits, which are classes, and which files in them count. Imports no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdlab.data import pictures
from kdlab.errors import UserError

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The names of a split's folder, in any case, with or without an ending such as ``_set``."""

_SPLIT_NAME = re.compile(
    rf"({'|'.join(name for names in SPLITS.values() for name in names)})"
    r"(?:[-_ ]?(?:set|split|data|images|imgs|pictures|samples))?"
)
_SYSTEM_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found")
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")


@dataclass
class Leftovers:
    """What lies in class folders, or beside them, and is not read.

    Args:
        endings: ending of a file name → how many files, for those that are not read as pictures.
        hidden: files and folders whose names begin with a dot.
        links: links to folders inside a class.
        outside: pictures in no class folder.
    """

    endings: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    outside: int = 0

    def lines(self) -> list[str]:
        """A line on what is left out, or none."""
        parts = []
        if self.endings:
            each = ", ".join(f"{ending} {n}" for ending, n in self.endings.most_common(8))
            more = ", ..." if len(self.endings) > 8 else ""
            parts.append(f"{_files(sum(self.endings.values()))} of other endings ({each}{more})")
        if self.hidden:
            parts.append(f"{self.hidden} hidden (the name begins with a dot)")
        if self.links:
            parts.append(f"{self.links} linked folder{'s' * (self.links > 1)} inside of a class")
        if self.outside:
            parts.append(f"{self.outside} picture{'s' * (self.outside > 1)} in no class folder")
        return [f"left out: {', '.join(parts)}"] if parts else []


def _files(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"


def is_system(name: str) -> bool:
    """Whether an operating system leaves files or folders of this name, which are nobody's data."""
    return name.startswith("._") or name.casefold() in (*_SYSTEM_FOLDERS, *_SYSTEM_FILES)


def folders(place: Path) -> list[Path]:
    """The folders in ``place`` that are neither hidden nor the system's, by name.

    Raises:
        UserError: if it cannot be listed, or a name is no text.
    """
    entries = (e for e in _scan(place) if not e.name.startswith(".") and not is_system(e.name))
    found = sorted(place / entry.name for entry in entries if entry.is_dir())
    for path in found:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path.name).decode(errors="backslashreplace")
            raise UserError(
                "data.root", f"{place} has a folder whose name is not in UTF-8 ({shown}); rename it"
            ) from None
    return found


def _scan(place: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except OSError as error:
        raise UserError("data.root", f"{place} cannot be listed ({error.strerror})") from None


def split_of(name: str) -> str | None:
    """The split that a folder of this name holds, if it is a usual one.

    >>> split_of("Training_Set"), split_of("Dev"), split_of("trains")
    ('train', 'val', None)
    """
    match = _SPLIT_NAME.fullmatch(name.strip().casefold())
    return match and next(split for split, names in SPLITS.items() if match[1] in names)


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split there is, empty if ``root`` holds class folders; and lines to say of it.

    Raises:
        UserError: for splits without train, two folders of one split, or splits beside other folders with pictures.
    """
    there = folders(root)
    found: dict[str, Path] = {}
    for path in there:
        split = split_of(path.name)
        if split in found:
            raise UserError(
                "data.root",
                f"{root} has {found[split].name} and {path.name}, which both are the {split} split",
                "one folder for each split",
            )
        if split is not None:
            found[split] = path
    if not found:
        _check_no_splits_inside(root, there)
        return {}, []
    found = {split: found[split] for split in SPLITS if split in found}
    names = ", ".join(path.name for path in found.values())
    others = [path.name for path in there if path not in found.values() and has_pictures(path)]
    advice = f"where a class has the name of a split, put all class folders into {root / 'train'}"
    if others:
        raise UserError(
            "data.root",
            f"{root} has split folders ({names}) and others with pictures ({_few(others)})",
            f"either splits ({_few([n for each in SPLITS.values() for n in each], 12)}) or classes; {advice}",
        )
    if "train" not in found:
        raise UserError("data.root", f"{root} has split folders ({names}) and none is train", f"one more; {advice}")
    told = [f"{path.name} is the {split} split" for split, path in found.items() if path.name not in SPLITS[split][:3]]
    return found, [", ".join(told)] if told else []


def _check_no_splits_inside(root: Path, classes: Sequence[Path]) -> None:
    """Refuse splits one level further down, whose pictures would all count as one split."""
    for path in classes:
        inside = [split_of(sub.name) for sub in folders(path)]
        if "train" in inside and len(inside) > 1 and None not in inside:
            advice = f"data.root={path}" if len(classes) == 1 else f"the splits above the classes: {root}/train/<class>"
            names = _few([sub.name for sub in folders(path)])
            raise UserError("data.root", f"{path} holds split folders ({names})", advice)


def _few(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def class_pictures(folder: Path, left: Leftovers) -> list[Path]:
    """The picture files of one class, also in folders inside it, in order; ``left`` counts the others.

    Raises:
        UserError: for no pictures, a link to nothing, and a folder that cannot be listed.
    """
    before = left.endings.copy()
    found = sorted(_walk(folder, left))
    if not found:
        others = ", ".join(f"{n} {ending}" for ending, n in (left.endings - before).most_common(4))
        raise UserError(
            "data.root",
            f"{folder} has no pictures{others and f' (it has {others})'}",
            f"files that end in {pictures.listed()}",
        )
    return found


def _walk(folder: Path, left: Leftovers) -> Iterator[Path]:
    """Every picture in a folder and the folders inside; hidden ones are not looked at."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        for entry in _scan(place):
            ending = os.path.splitext(entry.name)[1].lower()
            if is_system(entry.name):
                continue
            if entry.name.startswith("."):
                left.hidden += 1
            elif entry.is_dir():
                left.links += entry.is_symlink()
                # a link may lead back up
                waiting += [] if entry.is_symlink() else [place / entry.name]
            elif ending not in pictures.endings():
                left.endings[ending or "none"] += 1
            elif entry.is_file():
                yield place / entry.name
            else:
                reason = "a link to nothing" if entry.is_symlink() else "no regular file"
                raise UserError("data.root", f"{place / entry.name} is {reason}", "picture files")


def has_pictures(folder: Path) -> bool:
    """Whether a folder or one inside it holds a picture."""
    return next(_walk(folder, Leftovers()), None) is not None


def pictures_beside(place: Path) -> int:
    """How many pictures lie directly in a folder that should hold folders only."""
    return sum(
        not entry.name.startswith(".")
        and os.path.splitext(entry.name)[1].lower() in pictures.endings()
        and entry.is_file()
        for entry in _scan(place)
    )


def alike(names: Sequence[str]) -> list[str]:
    """A line on class names that differ in capitals only, or none."""
    counts = Counter(name.casefold() for name in names)
    same = [name for name in names if counts[name.casefold()] > 1]
    return [f"classes that differ in capitals only: {_few(same, 8)}; they count as different"] if same else []
