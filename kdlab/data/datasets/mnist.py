"""MNIST and Fashion-MNIST in the publisher's idx files, compressed or plain."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from kdlab.data.download import Remote, fetch
from kdlab.data.module import Common, ImageData, published
from kdlab.data.raw import RawDataset, Rows
from kdlab.errors import UserError
from kdlab.system.files import Unreadable, open_regular

_MOST_BYTES = 256 * 2**20
"""Limit of bytes that are read, more than the largest of the publishers' files, unpacked."""

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Layout:
    """Files and sizes that the publisher offers."""

    name: str
    class_names: tuple[str, ...]
    base: str
    checksums: tuple[str, ...]
    rows: tuple[int, int] = (60_000, 10_000)
    folders: tuple[str, ...] = (".", "raw")

    def remote(self, file: str) -> Remote:
        """Return where the publisher offers a file."""
        return Remote(f"{self.base}/{file}.gz", self.checksums[_FILES.index(file)])


MNIST = Layout(
    name="mnist",
    class_names=tuple(str(digit) for digit in range(10)),
    base="https://ossci-datasets.s3.amazonaws.com/mnist",
    checksums=(
        "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "md5:9fb629c4189551a2d022fa330f9573f3",
        "md5:ec29112dd5afa0611ce80d1b7f02629c",
    ),
    folders=(".", "raw", "MNIST/raw"),
)
FASHION_MNIST = Layout(
    name="fashion_mnist",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    base="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    checksums=(
        "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "md5:25c81989df183df01b3e8a0aad5dffbe",
        "md5:bef4ecab320f06d8554ea6380940ec79",
        "md5:bb300cfdad3c16e7a12a480ee83cd310",
    ),
    folders=(".", "raw", "FashionMNIST/raw"),
)


def mnist(root: str = "data/mnist", download: bool = False, **common: Unpack[Common]) -> ImageData:
    """Load MNIST: 60,000 training and 10,000 test digits, grey, 28 x 28 (LeCun, Bottou, Bengio and Haffner, 1998).

    Args:
        root: the folder of the four idx files (``train-images-idx3-ubyte`` ..., with or without ``.gz``).
        download: fetch them (11 MB) if they are not there.

    The other arguments are :class:`ImageData`'s, with ``batch_size`` 128 and ``val`` 5,000 unless given.
    """
    return published(source=_read(MNIST, root, download), **common)


def fashion_mnist(root: str = "data/fashion_mnist", download: bool = False, **common: Unpack[Common]) -> ImageData:
    """Load Fashion-MNIST: 60,000 training and 10,000 test pictures of clothes, grey, 28 x 28 (Xiao et al., 2017).

    Args:
        root: the folder of the four idx files (``train-images-idx3-ubyte`` ..., with or without ``.gz``).
        download: fetch them (30 MB) if they are not there.

    The other arguments are :class:`ImageData`'s, with ``batch_size`` 128 and ``val`` 5,000 unless given.
    """
    return published(source=_read(FASHION_MNIST, root, download), **common)


def _read(layout: Layout, root: str, download: bool) -> RawDataset:
    folder = Path(root).expanduser()
    arrays = [read_idx(_locate(layout, folder, file, download)) for file in _FILES]
    splits = []
    for images, labels, rows, part in zip(arrays[::2], arrays[1::2], layout.rows, ("train", "t10k"), strict=True):
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.ndim != 1:
            raise UserError(
                "data.root",
                f"{part} files in {folder} hold {tuple(images.shape)} and {tuple(labels.shape)}",
                "pictures of 28 x 28 and a label each",
            )
        if len(images) != rows or len(labels) != rows:
            raise UserError(
                "data.root",
                (
                    f"{part} files in {folder} have {len(images)} pictures and {len(labels)} labels; "
                    f"the publisher's have {rows}"
                ),
            )
        splits.append(Rows(images[:, None], labels.long()))
    return RawDataset(layout.name, splits[0], list(layout.class_names), test=splits[1])


def _locate(layout: Layout, root: Path, file: str, download: bool) -> Path:
    for folder in layout.folders:
        for name in (file, f"{file}.gz"):
            if (root / folder / name).is_file():
                return root / folder / name
    if not download:
        raise UserError(
            "data.root",
            (
                f"no {file} (or {file}.gz) in {root}; fetch it with data.download=true, or put "
                f"{layout.remote(file).url} there"
            ),
        )
    return fetch(layout.remote(file), root)


def read_idx(path: Path) -> Tensor:
    """Read the uint8 tensor in an idx file: two zero bytes, the type 8, the number of axes, their sizes, the values.

    Raises:
        UserError: if the file is cut short, too long, damaged, or something else.
    """
    try:
        with open_regular(path) as opened:
            file = gzip.GzipFile(fileobj=opened) if path.suffix == ".gz" else opened
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise Unreadable(f"more than {_MOST_BYTES // 2**20} MiB")
    except (OSError, EOFError, zlib.error, Unreadable) as error:
        raise UserError("data.root", f"{path} is truncated or damaged ({error})") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(
            "data.root", f"{path} is no idx file of bytes (it begins with {content[:4].hex() or 'nothing'})"
        )
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise UserError("data.root", f"{path} holds {len(content) - start} values, its header says {math.prod(shape)}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
