"""Arrays and archives from untrusted sources: the sizes that they announce are checked against the file.

A header of a few bytes can announce more numbers than there is memory, and a small archive unpack to a huge one.
Nothing is allocated before the file is seen to hold it. Pickles inside are refused. Imports no torch.
"""

from __future__ import annotations

import ast
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdlab.system.files import Unreadable, open_regular

UNPACKED_BYTES = 2**30
"""Number of bytes that a small archive may unpack to; a larger one, to ``UNPACKED_RATIO`` times its size."""

UNPACKED_RATIO = 16

HEADER_BYTES = 10_000
"""Longest header of an array that is read, in bytes: NumPy's own limit."""

_MAGIC = b"\x93NUMPY"


def read_array(path: str | Path, mapped: bool = False) -> np.ndarray:
    """Return the array in a ``.npy`` file.

    Args:
        path: the file.
        mapped: whether to leave it on the disk, mapped into memory.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no array of plain values, or announces more than it holds.
    """
    with open_regular(path) as file:
        shape, order, dtype = _header(file, os.fstat(file.fileno()).st_size)
        start, count = file.tell(), int(np.prod(shape, dtype=object))
        if mapped and count:
            return np.memmap(file, dtype, "r", start, shape, order)
        array = np.fromfile(file, dtype, count)
    return array.reshape(shape, order=order)


def read_arrays(path: str | Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays in a ``.npz`` file, by name.

    Args:
        path: the file.
        names: names of the arrays to read; None reads all.

    Raises:
        OSError: if it cannot be opened or read.
        Unreadable: if it is no archive of such arrays, lacks one of ``names``, or unpacks to far more than its size.
    """
    arrays: dict[str, np.ndarray] = {}
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, os.fstat(file.fileno()).st_size)
                members = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
                for name in members if names is None else names:
                    if name not in members:
                        raise Unreadable(f"has no array {name!r}; it has {', '.join(map(repr, members)) or 'none'}")
                    with archive.open(members[name]) as inner:
                        arrays[name] = _unpacked(inner, members[name].file_size)
        except (OSError, Unreadable):
            raise
        except Exception as error:  # of damaged bytes the readers raise almost anything
            raise Unreadable(f"a damaged archive of arrays ({error or type(error).__name__})") from None
    return arrays


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that unpacks to far more than its own ``size`` in bytes, going by what its members announce.

    Raises:
        Unreadable: with both sizes.
    """
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * size):
        raise Unreadable(f"{size / 2**20:.1f} MiB that unpack to {unpacked / 2**20:,.0f} MiB")


def _unpacked(file: IO[bytes], size: int) -> np.ndarray:
    shape, order, dtype = _header(file, size)
    wanted = math.prod(shape) * dtype.itemsize
    content = file.read(wanted + 1)
    if len(content) != wanted:
        raise Unreadable(f"its header announces {wanted} bytes, and there are {len(content)}")
    return np.ndarray(shape, dtype, bytearray(content), order=order)


def _header(file: IO[bytes], size: int) -> tuple[tuple[int, ...], Any, np.dtype]:
    """Return shape, order (C or F) and type of the array that follows; ``size`` is the whole file's, in bytes."""
    if (magic := file.read(8))[:6] != _MAGIC:
        kind = "empty" if not magic else "an archive (.npz)" if magic[:2] == b"PK" else "something else"
        raise Unreadable(f"no array (.npy): it is {kind}")
    if magic[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise Unreadable("an array of an unknown version")
    wide = struct.Struct("<H" if magic[6:] == b"\1\0" else "<I")
    (length,) = wide.unpack(file.read(wide.size).ljust(wide.size, b"\0"))
    if length > min(size, HEADER_BYTES):
        raise Unreadable("a damaged header: it is too long")
    shape, order, dtype = _parse(file.read(length).decode("latin1"))
    announced, held = math.prod(shape) * dtype.itemsize, size - 8 - wide.size - length
    if announced > held:
        raise Unreadable(f"its header announces {announced} bytes, and there are {max(held, 0)}")
    return shape, order, dtype


def _parse(header: str) -> tuple[tuple[int, ...], Any, np.dtype]:
    try:
        fields = ast.literal_eval(re.sub(r"(\d)L\b", r"\1", header))  # Python 2 wrote 10L
        shape, dtype = fields["shape"], np.dtype(fields["descr"])
        order = "F" if fields["fortran_order"] else "C"
    except Exception:  # a damaged header is any text
        raise Unreadable("a damaged header") from None
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise Unreadable(f"a damaged header: shape {shape!r}")
    if dtype.hasobject:
        raise Unreadable("an array of Python objects, which could run code")
    if not dtype.itemsize or max(shape, default=0) > 2**48:
        raise Unreadable(f"a damaged header: shape {shape!r} of {dtype}")
    return shape, order, dtype
