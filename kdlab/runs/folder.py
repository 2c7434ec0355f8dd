"""Run folders: claimed by one run, whole at any moment, enough to rebuild the model. Imports no torch."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from kdlab.config.builder import IRRELEVANT, config_hash, flatten
from kdlab.errors import Busy, RunFailed, UserError, told
from kdlab.runs.result import RESULT, load_result, read_result
from kdlab.system import integrity
from kdlab.system.files import (
    Unreadable,
    links_inside,
    lock_file,
    make_folder,
    read_bytes,
    read_json,
    read_mapping,
    remove_leftovers,
    write_text,
)
from kdlab.system.terminal import warn

__all__ = ["read_result", "write_text"]

log = logging.getLogger("kdlab")

_NOT_SHOWN = ("stages", "output", "resume", "name", "logger")

_LINKED = frozenset({"wandb"})
"""Folders of loggers that keep links of their own."""

_FOLDERS = ("checkpoints", "stages")
_FILES = (
    *("config.yaml", "overrides.yaml", "stages.yaml", RESULT, "model.json", "signature"),
    *(".lock", "run.log", "curves.jsonl", "student.pt", "checkpoints/last.ckpt", "checkpoints/best.pt"),
)

TARGETS = ("class", "next_token", "text")
"""Kinds of prediction: the values of :data:`kdlab.functional.types.Target`, without importing torch."""

MOST_INPUTS = 2**26
"""Largest number of values in one input of a model: a description of more is taken for damaged."""

FORMAT = 1
"""Version of ``result.json``."""


def claim(output: Path, name: str, config: Mapping[str, Any]) -> Path:
    """Make a new folder ``output/name/<time>-<hash>`` that no other run has.

    Raises:
        UserError: if ``output`` cannot be written to.
    """
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{config_hash(config)[:6]}"
    try:
        (output / name).mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
            try:
                (output / name / f"{stamp}{suffix}").mkdir()
            except FileExistsError:
                continue
            return output / name / f"{stamp}{suffix}"
    except OSError as error:
        raise UserError("output", f"{output}: {error.strerror}", "a folder that can be written to") from None
    raise RunFailed(f"no free folder under {output / name}")


def to_resume(resume: str, output: Path, name: str, config: Mapping[str, Any]) -> Path | None:
    """Return the folder that ``resume`` names; None where ``auto`` finds no run of this configuration.

    Raises:
        UserError: if it is not a run folder, or one of another configuration; names the first key that differs.
    """
    wanted = config_hash(config)
    if resume == "auto":
        runs = (path.parent for path in (output / name).glob("*/config.yaml"))
        # by time, and within a second by the number behind it
        for candidate in sorted(runs, key=lambda run: (run.name[:19], len(run.name), run.name), reverse=True):
            # a finished one too: a job that a cluster starts again does not run twice; a damaged one is no run of this
            try:
                if config_hash(read_config(candidate)) == wanted:
                    check_own(candidate)
                    return candidate
            except UserError as error:
                warn(f"{error}; passed over by resume=auto")
        return None
    folder = Path(resume)
    if not (folder / "config.yaml").exists():
        raise UserError("resume", f"{resume} is not a run folder (no config.yaml)", "a run folder, or auto")
    recorded = read_config(folder)
    if config_hash(recorded) != wanted:
        keys = differing_keys(recorded, config)
        reason = difference(keys[0], recorded, config) if keys else "its keys differ"
        raise UserError("resume", f"{resume} has another configuration: {reason}")
    check_own(folder)
    return folder


def check_own(folder: Path) -> None:
    """Refuse to go on in a run folder that holds what no run leaves there.

    A link inside of it could make the run write anywhere; a result that cannot be read would be written over.

    Raises:
        UserError: naming the file.
    """
    check_links(folder)
    try:
        load_result(folder)
    except (OSError, Unreadable) as error:
        raise UserError(
            "resume",
            f"{folder / RESULT}: damaged ({error})",
            "without it (remove it), and the run goes on from its checkpoints",
        ) from None


def make_job_folder(folder: Path) -> None:
    """Make the folder of one of several runs; one that is there must be a folder itself, and no link to one.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_folder(folder)
    except OSError as error:
        raise UserError("output", f"{folder}: {error.strerror}", "a folder that can be written to") from None


def check_links(folder: Path) -> None:
    """Refuse to write into a run folder that holds links, which could lead anywhere, or folders in the place of files.

    Raises:
        UserError: naming the first.
    """
    if strange := next(links_inside(folder, skip=_LINKED), None):
        raise UserError("resume", f"{strange} is a link, a pipe or a device", "files and folders (remove it)")
    for name in _FILES:
        if (folder / name).is_dir():
            raise UserError("resume", f"{folder / name} is a folder", "a file (remove it)")
    for name in _FOLDERS:
        if (folder / name).is_file():
            raise UserError("resume", f"{folder / name} is a file", "a folder (remove it)")


def differing_keys(recorded: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which two configurations differ, of those that can change a result."""
    a, b = flatten(recorded), flatten(configured)
    keys = sorted({*a, *b})
    relevant = [key for key in keys if not any(key == k or key.startswith(f"{k}.") for k in IRRELEVANT)]
    return [key for key in relevant if a.get(key) != b.get(key)]


def difference(key: str, recorded: Mapping[str, Any], configured: Mapping[str, Any]) -> str:
    """Return the values of a dotted key in two configurations, in words."""
    return f"{key} is {flatten(recorded).get(key)!r} there and {flatten(configured).get(key)!r} here"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process alone, and remove what killed processes left unfinished in it.

    Raises:
        Busy: if another process is running in it.
    """
    try:
        lock = lock_file(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy("resume", f"{folder} is in use by another process", "wait for it, or a new run") from None
    except OSError as error:
        raise UserError("resume", f"{folder}: cannot be locked ({error})", "a folder that a run made") from None
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()  # the file stays: unlinking it would let two processes lock two files of one name


def tidy(folder: Path) -> None:
    """Remove what killed processes left unfinished in a run's folder, unless it is in use or can only be read."""
    with suppress(Busy, OSError), held(folder):
        pass


def write_config(
    folder: Path,
    config: Mapping[str, Any],
    overrides: Sequence[str],
    stages: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the resolved configuration, that of each stage if there are any, and the overrides that the user typed."""
    write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    if stages:
        composed = {"config_hash": config_hash(config), "stages": {name: dict(one) for name, one in stages.items()}}
        write_text(folder / "stages.yaml", yaml.safe_dump(composed, sort_keys=False, allow_unicode=True))
    write_text(folder / "overrides.yaml", yaml.safe_dump(list(overrides), allow_unicode=True))


def write_result(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` last, since a folder that has one is finished, and return its content.

    It gets the hashes of the weights and descriptions that are there, and a checksum of its own.
    """
    sealed = integrity.sealed(folder, result)
    write_text(folder / "result.json", json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=True) + "\n")
    return sealed


def read_model(folder: Path) -> dict[str, Any]:
    """Return the content of ``model.json``: how to build a run's model, and how to read its inputs and outputs.

    Raises:
        UserError: if it is no run folder, or the file is damaged.
    """
    try:
        described = read_json(folder / "model.json")
        if isinstance(described, dict):  # earlier versions did not say what is predicted
            described.setdefault("target", "next_token" if "tokenizer" in described else "class")
        _check_model(described)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(folder, "no run folder (no model.json)", "a folder under outputs/") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/model.json", f"damaged or of another program ({error})") from None
    return described


def _check_model(described: object) -> None:
    """Raise ``ValueError`` where ``model.json`` describes a model that cannot exist."""
    if not isinstance(described, dict):
        raise ValueError(f"holds {type(described).__name__}")
    if described["target"] not in TARGETS:
        raise ValueError(f"target is {described['target']!r}")
    classified, tokens = described["target"] == "class", "tokenizer" in described
    needed = (*(("classes",) if classified else ("tokenizer",)), *(() if tokens else ("input_shape",)))
    for key in ("weights", "network", *needed):
        if key not in described:
            raise ValueError(f"has no {key}")
    for key in ("weights", "tokenizer"):
        if not isinstance(described.get(key, ""), str):
            raise ValueError(f"{key} is no text")
    for key in ("network", "arguments", "tasks"):
        if not isinstance(described.get(key, {}), dict):
            raise ValueError(f"{key} is no mapping")
    steps = described.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(one, dict) for one in steps):
        raise ValueError("steps are no mappings")
    if not classified:
        return
    names = [described["classes"], *described.get("tasks", {}).values()]
    if not all(isinstance(some, list) and all(isinstance(one, str) for one in some) for some in names):
        raise ValueError("classes are no lists of names")
    if tokens:
        return
    shape = described["input_shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape) or not shape:
        raise ValueError("input_shape is no list of whole numbers above 0")
    if math.prod(shape) > MOST_INPUTS:
        raise ValueError(f"input_shape {shape} is of more than {MOST_INPUTS:,} numbers")


def record_failure(folder: Path, config: Mapping[str, Any], overrides: Sequence[str], error: BaseException) -> None:
    """Write in ``result.json`` that a run failed, and why; its checkpoints stay."""
    make_job_folder(folder)
    if not (folder / "config.yaml").exists():
        write_config(folder, config, overrides)
    message = " ".join(str(error).split())
    text = message if isinstance(error, UserError | RunFailed) else " ".join(told(error).split())
    result = {
        "format": FORMAT,
        "status": "failed",
        "error": text,
        "name": config.get("name"),
        "config_hash": config_hash(config),
        "seed": config.get("seed"),
        "overrides": list(overrides),
        "settings": settings(config),
        "models": {},
        "finished": now(),
    }
    write_result(folder, result)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every plain value of a run's configuration, flat, for tables."""
    hidden = ("stages", "continued_from.state")
    flat = {k: v for k, v in flatten(config).items() if not k.endswith("_target_") and not k.startswith(hidden)}
    for key in ("loss.temperature", "loss.alpha"):
        value = config.get("loss", {}).get(key.split(".")[1])
        if isinstance(value, Mapping):
            flat = {k: v for k, v in flat.items() if not k.startswith(f"{key}.")}
            flat[key] = describe(value)
    return flat


def describe(value: Mapping[str, Any]) -> str:
    """Describe a schedule or an object in a few words: ``8 → 1 cosine``, ``LearnedTemperature``."""
    if "start" in value and "end" in value:
        return f"{value['start']:g} → {value['end']:g} {value.get('shape', 'linear')}"
    return str(value.get("_target_", "")).rpartition(".")[2] or json.dumps(dict(value), sort_keys=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run.

    Raises:
        UserError: if it cannot be read or is no mapping.
    """
    path = folder / "config.yaml"
    try:
        return read_mapping(path)
    except (OSError, Unreadable) as error:
        raise UserError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def now() -> str:
    """Return the time as ISO 8601, with seconds."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


# ---- signatures: what a folder asks to build is trusted only if this user made it -----------------------------------


def sign(folder: Path) -> None:
    """Mark ``model.json`` as this user's own, with a key that stays in the user's home.

    Where there is no home to keep a key in, the folder stays unsigned: `predict` then asks for ``--trust``, and only if
    the model is the user's own code.
    """
    try:
        write_text(folder / "signature", _signature(folder) + "\n")
    except (OSError, RuntimeError, Unreadable) as error:
        log.info("this run is not signed as yours (%s)", error)


def is_mine(folder: Path) -> bool:
    """Return whether this user's kdlab wrote the ``model.json`` in ``folder``, as it stands."""
    try:
        return hmac.compare_digest(read_bytes(folder / "signature").strip(), _signature(folder).encode())
    except (OSError, RuntimeError, Unreadable):
        return False


def _signature(folder: Path) -> str:
    return hmac.new(_user_key(), read_bytes(folder / "model.json"), hashlib.sha256).hexdigest()


def _user_key() -> bytes:
    """Return the user's key of 32 bytes; it is made once, whole, even if two processes ask for it at the same time."""
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kdlab"
    path = home / "key"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = home / f".key.{secrets.token_hex(4)}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(fresh, path)  # unlike a rename, this does not replace a key that is there by now
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if len(text) != 64:
        raise OSError(f"{path} holds no key; remove it, and a new one is made")
    return text.encode()
