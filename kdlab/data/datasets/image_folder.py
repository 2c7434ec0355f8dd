"""Pictures in folders, one folder a class."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch

from kdlab.data import pictures
from kdlab.data.datasets.folder_layout import Leftovers, alike, class_pictures, folders, pictures_beside, split_folders
from kdlab.data.module import Common, ImageData
from kdlab.data.pictures import Look
from kdlab.data.raw import Files, RawDataset, Rows, sample_of
from kdlab.errors import UserError, unknown
from kdlab.ranges import whole_number


def image_folder(
    root: str = "data/images",
    size: int = 32,
    channels: int = 3,
    test: int | float | None = None,
    memory: float = 2e9,
    workers: int | None = None,
    **common: Unpack[Common],
) -> ImageData:
    """Load pictures in class folders.

    Either ``root/train/<class>/*``, with ``val`` and ``test`` beside ``train`` or not; or all in ``root/<class>/*``,
    divided here.

    The split folders may have any usual spelling (``Training``, ``valid``, ``Dev``, ``test_set``); they stand beside no
    others with pictures. A class folder may hold folders. Hidden files and folders are passed over, and files that are
    no pictures are counted in the log. :mod:`kdlab.data.pictures` says how each kind of picture is read.

    Args:
        root: the folder.
        size: every picture's shorter side is brought to so many pixels, and the middle square cut out.
        channels: 3, or 1 for grey.
        test: rows (a number, or a fraction) taken from train where there is no test folder; None is a tenth.
        memory: size in bytes up to which pictures are decoded once and kept as a tensor on the compute device; larger
            sets stream from disk.
        workers: processes that decode a streamed set; None is one less than there are CPU cores, up to 8.
        val: None is the val folder, or a tenth of train where there is none.

    The other arguments are :class:`ImageData`'s. Classes are numbered in the order of their folders' names.

    Raises:
        UserError: for a missing or empty folder, folders of which it is not clear whether they are splits or classes,
            a class that only val or test has, a picture that cannot be decoded.
    """
    for name, value, accepted in (("size", size, range(1, 4097)), ("channels", channels, (1, 3))):
        if value not in accepted:
            bounds = "1 or 3" if name == "channels" else "1..4096"
            raise UserError(f"data.{name}", f"{value!r}", bounds)
    if workers is not None:
        whole_number("data.workers", workers, 0)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError("data.root", f"there is no folder {folder}", "a folder with a sub-folder for each class")
    places, notes = split_folders(folder)
    if "test" in places and test not in (None, 0):
        raise UserError("data.test", f"{test}; {places['test']} is there", "null (use it) or 0 (none)")
    if test == 0:
        places.pop("test", None)
    left = Leftovers(outside=pictures_beside(folder) if places else 0)
    places = places or {"train": folder}
    class_names = [path.name for path in folders(places["train"])]
    empty = Files(folder, [], size, channels, workers)
    rows = {split: _files(empty, split, place, class_names, left) for split, place in places.items()}
    if len(class_names) < 2:
        raise UserError("data.root", f"{places['train']} has one sub-folder, {class_names[0]}", "two or more classes")
    if sum(math.prod(r.inputs.shape) for r in rows.values()) <= memory:
        decoded = {split: _decode(r) for split, r in rows.items()}
        rows = {split: part for split, (part, _) in decoded.items()}
        notes += pictures.summary(look for _, looks in decoded.values() for look in looks)
    else:
        notes += _sample(rows)
    source = RawDataset(
        folder.name,
        rows["train"],
        class_names,
        val=rows.get("val"),
        test=rows.get("test", 0.1 if test is None else test),
        notes=[*notes, *alike(class_names), *left.lines()],
    )
    return ImageData(source, **common)


def _files(empty: Files, split: str, place: Path, class_names: list[str], left: Leftovers) -> Rows:
    """List the pictures of one split, in the order of their names; ``empty`` says how they are read."""
    names, targets = [], []
    class_folders = folders(place)
    if not class_folders:
        without = ", or data.test=0" if split == "test" else ""
        raise UserError("data.root", f"{place} has no sub-folders", f"one for each class{without}")
    left.outside += pictures_beside(place)
    for folder in class_folders:
        if folder.name not in class_names:
            raise unknown(f"data.root: {place}", folder.name, class_names, "class folder")
        paths = class_pictures(folder, left)
        names += [str(p.relative_to(empty.root)) for p in paths]
        targets += [class_names.index(folder.name)] * len(paths)
    return Rows(replace(empty, names=names), torch.tensor(targets, dtype=torch.long))


def _decode(rows: Rows) -> tuple[Rows, list[Look]]:
    """Return the same rows with their pictures in memory, and remarks on how each picture is read."""
    files = rows.inputs
    assert isinstance(files, Files)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        pictures_read = list(pool.map(files.picture, range(len(files))))
    return Rows(torch.stack([pixels for pixels, _ in pictures_read]), rows.targets), [look for _, look in pictures_read]


def _sample(rows: dict[str, Rows]) -> list[str]:
    """Return lines on how pictures that stay on disk are read, from a sample's headers, and set ``Files.deep``."""
    seen = []
    for part in rows.values():
        files = part.inputs
        assert isinstance(files, Files)
        looks = [pictures.look(files.root / files.names[i]) for i in sample_of(len(files))]
        files.deep = any(look.remarks & {"deep", "float"} for look in looks)
        seen += looks
    return pictures.summary(seen, "looked at")
