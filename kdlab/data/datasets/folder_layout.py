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
"""Names of a split's folder, in any case, with or without an ending such as ``_set``."""

_SPLIT_NAME = re.compile(
    rf"({'|'.join(name for names in SPLITS.values() for name in names)})"
    r"(?:[-_ ]?(?:set|split|data|images|imgs|pictures|samples))?"
)
_SYSTEM_FOLDERS = ("__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found")
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")


@dataclass
class Leftovers:
    """Counts of the files and folders in or beside class folders that are not read.

    Args:
        endings: ending of a file name → number of files, for those that are not read as pictures.
        hidden: files and folders whose names begin with a dot.
        links: links to folders inside a class.
        outside: pictures in no class folder.
    """

    endings: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    links: int = 0
    outside: int = 0

    def lines(self) -> list[str]:
        """Return a line on what is left out, or none."""
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
    """Return whether an operating system leaves files or folders of this name, which are nobody's data."""
    return name.startswith("._") or name.casefold() in (*_SYSTEM_FOLDERS, *_SYSTEM_FILES)


def folders(place: Path) -> list[Path]:
    """Return the folders in ``place`` that are neither hidden nor the system's, by name.

    Raises:
        UserError: if it cannot be listed, or a name is no text.
    """
    entries = (e for e in _scan(place) if not e.name.startswith(".") and not is_system(e.name))
    paths = sorted(place / entry.name for entry in entries if entry.is_dir())
    for path in paths:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path.name).decode(errors="backslashreplace")
            raise UserError(
                "data.root", f"{place} has a folder whose name is not in UTF-8 ({shown}); rename it"
            ) from None
    return paths


def _scan(place: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except OSError as error:
        raise UserError("data.root", f"{place} cannot be listed ({error.strerror})") from None


def split_of(name: str) -> str | None:
    """Return the split that a folder of this name holds, if it is a usual one.

    >>> split_of("Training_Set"), split_of("Dev"), split_of("trains")
    ('train', 'val', None)
    """
    match = _SPLIT_NAME.fullmatch(name.strip().casefold())
    return match and next(split for split, names in SPLITS.items() if match[1] in names)


def split_folders(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of each split there is, empty if ``root`` holds class folders; and lines for the log on it.

    Raises:
        UserError: for splits without train, two folders of one split, or splits beside other folders with pictures.
    """
    there = folders(root)
    split_paths: dict[str, Path] = {}
    for path in there:
        split = split_of(path.name)
        if split in split_paths:
            raise UserError(
                "data.root",
                f"{root} has {split_paths[split].name} and {path.name}, which both are the {split} split",
                "one folder for each split",
            )
        if split is not None:
            split_paths[split] = path
    if not split_paths:
        _check_no_splits_inside(root, there)
        return {}, []
    split_paths = {split: split_paths[split] for split in SPLITS if split in split_paths}
    names = ", ".join(path.name for path in split_paths.values())
    others = [path.name for path in there if path not in split_paths.values() and has_pictures(path)]
    advice = f"where a class has the name of a split, put all class folders into {root / 'train'}"
    if others:
        raise UserError(
            "data.root",
            f"{root} has split folders ({names}) and others with pictures ({_few(others)})",
            f"either splits ({_few([n for each in SPLITS.values() for n in each], 12)}) or classes; {advice}",
        )
    if "train" not in split_paths:
        raise UserError("data.root", f"{root} has split folders ({names}) and none is train", f"one more; {advice}")
    renamed = [
        f"{path.name} is the {split} split" for split, path in split_paths.items() if path.name not in SPLITS[split][:3]
    ]
    return split_paths, [", ".join(renamed)] if renamed else []


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
    """Return the picture files of one class, also in folders inside it, in order; ``left`` counts the others.

    Raises:
        UserError: for no pictures, a link to nothing, and a folder that cannot be listed.
    """
    before = left.endings.copy()
    paths = sorted(_walk(folder, left))
    if not paths:
        others = ", ".join(f"{n} {ending}" for ending, n in (left.endings - before).most_common(4))
        raise UserError(
            "data.root",
            f"{folder} has no pictures{others and f' (it has {others})'}",
            f"files that end in {pictures.listed()}",
        )
    return paths


def _walk(folder: Path, left: Leftovers) -> Iterator[Path]:
    """Yield every picture in a folder and the folders inside; hidden ones are not looked at."""
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
    """Return whether a folder or one inside it holds a picture."""
    return next(_walk(folder, Leftovers()), None) is not None


def pictures_beside(place: Path) -> int:
    """Count the pictures that lie directly in a folder that should hold folders only."""
    return sum(
        not entry.name.startswith(".")
        and os.path.splitext(entry.name)[1].lower() in pictures.endings()
        and entry.is_file()
        for entry in _scan(place)
    )


def alike(names: Sequence[str]) -> list[str]:
    """Return a line on class names that differ in capitals only, or none."""
    counts = Counter(name.casefold() for name in names)
    same = [name for name in names if counts[name.casefold()] > 1]
    return [f"classes that differ in capitals only: {_few(same, 8)}; they count as different"] if same else []
