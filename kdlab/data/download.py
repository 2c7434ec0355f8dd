"""Fetch a data set from its publisher: checked, with a progress bar, and never half there."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from kdlab.config.trust import read_only
from kdlab.errors import UserError
from kdlab.plain_text import one_line
from kdlab.system.files import lock_file, open_regular

_BLOCK = 1 << 20
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Remote:
    """A publisher's file."""

    url: str
    checksum: str
    """Checksum ``md5:...`` or ``sha256:...``, as published."""

    @property
    def filename(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


def digest(path: Path, checksum: str) -> str:
    """Compute the checksum of a file, in the form and by the algorithm of ``checksum``."""
    algorithm = checksum.partition(":")[0]
    with open_regular(path) as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def fetch(remote: Remote, folder: Path, key: str = "data.download") -> Path:
    """Return the path of the publisher's file in ``folder``, downloaded unless it is there already.

    The file appears under its name only when it is complete and its checksum is right. Several processes may ask at
    once: one downloads, the others wait.

    Raises:
        UserError: if the publisher cannot be reached, the file is cut short, or its checksum is another one.
    """
    if read_only():
        raise UserError(key, "nothing is fetched for a folder that is not trusted", f"--trust, or {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / remote.filename
    with lock_file(f"{path}.lock"):
        if path.exists():
            checksum = digest(path, remote.checksum)
            if checksum == remote.checksum:
                return path
            raise UserError(
                key,
                (
                    f"{path} is there with checksum {checksum}, the publisher's is {remote.checksum}; "
                    "remove the file to have it fetched again"
                ),
            )
        _download(remote, path, key)
    return path


def _download(remote: Remote, path: Path, key: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            expected, received = _stream(remote, file, path.parent, key)
        if expected is not None and received != expected:
            raise UserError(key, f"{remote.url} broke off after {received} of {expected} bytes; try again")
        checksum = digest(part, remote.checksum)
        if checksum != remote.checksum:
            raise UserError(
                key, (f"{remote.url} has checksum {checksum}, the publisher's is {remote.checksum}; nothing was kept")
            )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _stream(remote: Remote, file: IO[bytes], folder: Path, key: str) -> tuple[int | None, int]:
    """Copy the remote file; returns the announced and the received number of bytes."""
    expected, received = None, 0
    try:
        with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            expected = int(length) if length else None
            bar = tqdm(
                total=expected,
                desc=one_line(remote.filename),
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                disable=None,  # shown on a terminal only
            )
            with bar:
                while block := response.read(_BLOCK):
                    file.write(block)
                    received += len(block)
                    bar.update(len(block))
    except http.client.IncompleteRead:
        pass  # the caller compares the counts
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            key, (f"cannot fetch {remote.url} ({reason}); fetch it on another machine and put it into {folder}")
        ) from None
    return expected, received


def unpack(archive: Path, folder: str, key: str) -> Path:
    """Unpack the sub-folder ``folder`` of a tar archive beside the archive; it appears whole or not at all.

    Raises:
        UserError: if the archive is damaged, holds no such folder, or has members that point outside of it.
    """
    if read_only():
        raise UserError(key, f"{archive} is not unpacked for a folder that is not trusted", "--trust")
    target = archive.parent / folder
    with lock_file(f"{archive}.lock"):
        if target.is_dir():
            return target
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder}.", dir=archive.parent))
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            if not (scratch / folder).is_dir():
                raise UserError(key, f"{archive} holds no folder {folder}")
            os.replace(scratch / folder, target)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(key, f"{archive} is truncated, damaged or no tar archive ({error})") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
