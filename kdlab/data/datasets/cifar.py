"""CIFAR-10 and CIFAR-100 in the publisher's python layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from kdlab.data import safe_pickle
from kdlab.data.download import Remote, fetch, unpack
from kdlab.data.labels import Label, combine_labels, names_of, requested
from kdlab.data.module import Common, ImageData, published
from kdlab.data.raw import RawDataset, Rows
from kdlab.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Files and sizes of the publisher's folder."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    train_rows: int
    test_rows: int
    remote: Remote


CIFAR10 = Layout(
    name="cifar10",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    train_rows=50_000,
    test_rows=10_000,
    remote=Remote("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),
)
CIFAR100 = Layout(
    name="cifar100",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    train_rows=50_000,
    test_rows=10_000,
    remote=Remote("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"),
)


def cifar10(root: str = "data/cifar10", download: bool = False, **common: Unpack[Common]) -> ImageData:
    """Load CIFAR-10: 50,000 training and 10,000 test pictures, 3 x 32 x 32, 10 classes (Krizhevsky, 2009).

    Args:
        root: the folder that holds ``cifar-10-batches-py`` or ``cifar-10-python.tar.gz``, or is the former.
        download: fetch the archive from the publisher (170 MB) if it is not there.
        val: the 5,000 rows by default are for choosing the best epoch; 0 trains on all 50,000, as published results do.

    The other arguments are :class:`ImageData`'s, with ``batch_size`` 128 and ``val`` 5,000 unless given.
    """
    return published(source=_read(CIFAR10, root, download, {"class": ("labels", "label_names")}), **common)


def cifar100(
    root: str = "data/cifar100", label: Label = "fine", download: bool = False, **common: Unpack[Common]
) -> ImageData:
    """Load CIFAR-100: 50,000 training and 10,000 test pictures, 3 x 32 x 32 (Krizhevsky, 2009).

    Args:
        root: the folder that holds ``cifar-100-python`` or ``cifar-100-python.tar.gz``, or is the former.
        label: ``fine`` (100 classes), ``coarse`` (20), or a list of both for two tasks at once.
        download: fetch the archive from the publisher (169 MB) if it is not there.
        val: the 5,000 rows by default are for choosing the best epoch; 0 trains on all 50,000, as published results do.

    The other arguments are :class:`ImageData`'s, with ``batch_size`` 128 and ``val`` 5,000 unless given.
    """
    names_of(label, ("fine", "coarse"))
    names = {name: (f"{name}_labels", f"{name}_label_names") for name in ("fine", "coarse")}
    return published(source=_read(CIFAR100, root, download, names, label), **common)


def _read(
    layout: Layout, root: str, download: bool, labels: Mapping[str, tuple[str, str]], label: Label | None = None
) -> RawDataset:
    """Read a source with the publisher's labels: name of each → its key, and the key of its classes' names."""
    folder = _locate(layout, Path(root).expanduser(), download)
    meta = _content(folder / layout.meta, tuple(names for _, names in labels.values()))
    keys = [key for key, _ in labels.values()]
    train = [_rows(folder / file, keys, layout.train_rows // len(layout.train)) for file in layout.train]
    pictures, *ids = (torch.cat(parts) for parts in zip(*train, strict=True))
    test, *test_ids = _rows(folder / layout.test, keys, layout.test_rows)
    named = {name: [str(one) for one in meta[names]] for name, (_, names) in labels.items()}
    columns = {n: ([ids[k], test_ids[k]], named[n]) for k, n in enumerate(labels)}
    if len(columns) == 1:  # as they are: a class without a row keeps its number
        (kinds, class_names) = next(iter(columns.values()))
        return RawDataset(layout.name, Rows(pictures, kinds[0]), class_names, test=Rows(test, kinds[1]))
    kinds, class_names, known = combine_labels(columns, "data.root")
    source = RawDataset(layout.name, Rows(pictures, kinds[0]), class_names, test=Rows(test, kinds[1]))
    return requested(source, known, label)


def _locate(layout: Layout, root: Path, download: bool) -> Path:
    """Return the publisher's folder, unpacked or fetched if need be."""
    for folder in (root / layout.folder, root):
        if (folder / layout.meta).is_file():
            return folder
    archive = root / layout.remote.filename
    if not archive.is_file():
        if not download:
            raise UserError(
                "data.root",
                (f"no {layout.folder} in {root}; fetch it with data.download=true, or put {layout.remote.url} there"),
            )
        archive = fetch(layout.remote, root)
    return unpack(archive, layout.folder, "data.root")


def _content(path: Path, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Read the mapping in one of the publisher's pickles, which must have the ``wanted`` keys."""
    if not path.is_file():
        raise UserError("data.root", f"{path} is missing; fetch the set again with data.download=true")
    content = safe_pickle.load(path, "data.root")
    if not isinstance(content, dict):
        raise UserError("data.root", f"{path} holds a {type(content).__name__}", "the publisher's mapping")
    content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in wanted:
        if key not in content:
            raise UserError("data.root", f"{path} has no {key!r}; it holds {', '.join(map(str, content)) or 'nothing'}")
    return content


def _rows(path: Path, keys: Sequence[str], expected: int) -> tuple[Tensor, ...]:
    """Read the pictures, and the ids of each label."""
    content = _content(path, ("data", *keys))
    data, labels = np.asarray(content["data"]), [np.asarray(content[key]) for key in keys]
    whole = all(ids.dtype.kind in "iu" for ids in labels)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or not whole:
        raise UserError("data.root", f"{path} holds {data.dtype} {data.shape}", "uint8 rows of 3072 = 3 x 32 x 32")
    for ids in labels:
        if len(data) != expected or len(ids) != expected:
            raise UserError(
                "data.root", f"{path} has {len(data)} pictures and {len(ids)} labels; the publisher's has {expected}"
            )
    return torch.from_numpy(data.reshape(-1, 3, 32, 32)), *(torch.from_numpy(i.astype(np.int64)) for i in labels)
