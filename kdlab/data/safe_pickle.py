"""Read someone else's pickle: NumPy arrays and plain containers, nothing that can run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.errors import UserError
from kdlab.system.files import open_regular


def _admitted() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return the callables by the names that a pickle may use; nothing is imported for a file."""
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float32(0).__reduce__()[0]
    buffer: Any = np.zeros(1).__reduce_ex__(5)[0]
    admitted: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2 spell it differently
        admitted[f"{core}.multiarray", "_reconstruct"] = reconstruct
        admitted[f"{core}.multiarray", "scalar"] = scalar
        admitted[f"{core}.numeric", "_frombuffer"] = buffer
    return admitted


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Encode text as latin1, as Python 3 writes bytes into pickles of protocol 2; refuse other encodings."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    admitted = _admitted()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.admitted[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


class _Refused(Exception):
    """Error for a pickle that names something that is neither an array nor a plain container."""


def load(path: Path, key: str) -> Any:
    """Load a pickle of NumPy arrays, numbers, text, lists, tuples and dicts.

    Reads protocol 4 as well as Python 2's pickles, whose strings become ``str`` by latin1.

    Args:
        path: the file.
        key: the config key to name in errors.

    Raises:
        UserError: if the file is truncated, no pickle, or names any other class or function, which is not called.
    """
    try:
        with open_regular(path) as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _Refused as refused:
        raise UserError(
            key, f"{path} is refused: it wants {refused}", "pickles of NumPy arrays and plain containers"
        ) from None
    except OSError as error:
        raise UserError(key, f"cannot read {path} ({error.strerror})") from None
    except Exception as error:
        # a damaged pickle raises almost anything: UnpicklingError, EOFError, ValueError, KeyError, MemoryError ...
        reason = str(error) or type(error).__name__
        raise UserError(key, f"{path} is truncated, damaged or no pickle ({reason})") from None
