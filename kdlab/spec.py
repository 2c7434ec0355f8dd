"""From a mapping of the config to the object it describes, and nothing else that the config could name.

``check`` binds every mapping to the signature of its owner without importing it; ``build`` is the one
function that makes objects. What may be built is a short list of prefixes: a ``_target_`` elsewhere is
refused, and so is a name that an allowed module merely imported.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlab.annotations import Mismatch, fit, kinds
from kdlab.errors import UserError, nearest, unknown
from kdlab.signatures import NotFound, Parameter, Signature, find, signature

__all__ = ["build", "check", "config_hash", "flatten", "signature", "trust"]

TARGET = "_target_"

PREFIXES = (
    "kdlab.data.",
    "kdlab.functional.",
    "kdlab.losses.",
    "kdlab.methods.",
    "kdlab.models.",
    "kdlab.runs.loggers.",
    "kdlab.tasks.",
    "kdlab.teachers.",
    "torch.nn.",
    "torch.optim.",
)
"""What a config may build, besides the user's own modules where those are trusted."""

TEXT = ("vocab_size", "context", "eos_id", "pad_id", "mels", "frames")
"""What the tokenizer, the length of sequences and the size of sound features say to a network."""

SUPPLIED = ("num_classes", "in_channels", "in_features", "image_size", "mean", "std", "seed", *TEXT)
"""Arguments that code supplies when the config leaves them null."""

IRRELEVANT = (
    "name",
    "output",
    "resume",
    "continued_from.run",
    "logger",
    "trainer.progress",
    "trainer.log_every",
    "trainer.gradients",
    "trainer.save_minutes",
)
"""Keys that do not change a result, and so are left out of its hash."""


ADDED = ("teacher.weights", "pretrained.weights")
"""Keys that earlier versions did not have: left out of the hash where they are null, so that their runs go on."""


@dataclass(frozen=True)
class Trust:
    """What may be built now."""

    prefixes: tuple[str, ...] = PREFIXES
    user_modules: bool = False


_trust = Trust()


@contextmanager
def trust(*, user_modules: bool = False, prefixes: tuple[str, ...] = PREFIXES) -> Iterator[None]:
    """Set what ``check`` and ``build`` accept: narrower prefixes, or the user's own modules too.

    A user's module is one that Python finds outside its standard library and site-packages: in the working
    folder, on PYTHONPATH. The command line trusts them; someone else's run folder does not get them.
    """
    global _trust
    before, _trust = _trust, Trust(tuple(prefixes), user_modules)
    try:
        yield
    finally:
        _trust = before


def check(
    mapping: Mapping[str, Any],
    path: str = "",
    *,
    target: str | None = None,
    supplied: Collection[str] = SUPPLIED,
) -> None:
    """Bind a mapping, and all mappings inside it, to their owners' signatures; nothing is imported or built.

    Args:
        mapping: has a ``_target_``, unless ``target`` names its owner.
        path: where it stands in the config, for messages.
        target: dotted name of the owner of a plain mapping (a dataclass or function).
        supplied: arguments that may be null because code gives them.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a target that is not there or not allowed.
    """
    owner = _permitted(mapping, path) if target is None else _found(target, path)
    given = {k: v for k, v in mapping.items() if k != TARGET}
    _bind(owner, given, path, supplied)
    for name, value in given.items():
        _check_inside(value, _join(path, name), supplied)


def _check_inside(value: Any, path: str, supplied: Collection[str]) -> None:
    if isinstance(value, Mapping):
        if TARGET in value:
            check(value, path, supplied=supplied)
        else:
            for name, inner in value.items():
                _check_inside(inner, _join(path, name), supplied)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_inside(inner, f"{path}[{i}]", supplied)


def build(
    mapping: Mapping[str, Any], path: str = "", /, *, offer: Mapping[str, Any] | None = None, **from_code: Any
) -> Any:
    """Build what a mapping with ``_target_`` describes, mappings inside it first.

    Args:
        mapping: ``{_target_: dotted.name, argument: value, ...}``.
        path: where it stands in the config, for messages.
        offer: arguments that it gets if its signature wants them and the config leaves them out or null; a network
            inside it, for an argument that is an ``nn.Module``, likewise.
        **from_code: arguments that it always gets.

    Raises:
        UserError: as :func:`check`; an argument that is missing; or what the constructor itself refuses.
    """
    owner = _permitted(mapping, path)
    offer = dict(offer or {})
    given = _bind(owner, {k: v for k, v in mapping.items() if k != TARGET}, path, (*SUPPLIED, *offer))
    for name, value in offer.items():
        if name in owner.parameters and given.get(name) is None:
            given[name] = value
    for name in from_code:
        if name not in owner.parameters and not owner.open:
            raise UserError(f"{_join(path, TARGET)}: {owner.target} takes no argument {name!r}, which kdlab gives it")
    missing = [n for n, p in owner.parameters.items() if p.required and n not in given and n not in from_code]
    if missing:
        raise UserError(f"{_join(path, missing[0])}: missing; {owner.target} needs {', '.join(missing)}")
    inside = {name: offer if _is_network(owner.parameters.get(name)) else None for name in given}
    made = {name: _build_inside(value, _join(path, name), inside[name]) for name, value in given.items()}
    try:
        return _resolve(owner.target, path)(**{**made, **from_code})
    except UserError as error:
        raise _placed(error, path, owner) from None


def _is_network(parameter: Parameter | None) -> bool:
    """Whether an argument is annotated as an ``nn.Module``."""
    return parameter is not None and any(k.label == "Module" for k in kinds(parameter.annotation, parameter.scope))


def _build_inside(value: Any, path: str, offer: Mapping[str, Any] | None = None) -> Any:
    if isinstance(value, Mapping):
        if TARGET in value:
            return build(value, path, offer=offer)
        return {name: _build_inside(inner, _join(path, name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_build_inside(inner, f"{path}[{i}]") for i, inner in enumerate(value)]
    return value


def _placed(error: UserError, path: str, owner: Signature) -> UserError:
    """The constructor's message, led by where in the config it happened."""
    text = str(error)
    if not path or text.startswith(path.split(".")[0]):
        return error
    return UserError(f"{path}.{text}" if text.split(":")[0].split(".")[0] in owner.parameters else f"{path}: {text}")


def _bind(owner: Signature, given: Mapping[str, Any], path: str, supplied: Collection[str]) -> dict[str, Any]:
    """Values as the owner's annotations want them."""
    bound = {}
    for name, value in given.items():
        where = _join(path, name)
        parameter = owner.parameters.get(name)
        if parameter is None:
            if not owner.open:
                raise unknown(where, name, owner.parameters, f"key of {owner.target}")
            bound[name] = value
        elif value == "???":
            raise UserError(f"{where}: not set; give it a value")
        elif value is None and name in supplied:
            bound[name] = None
        else:
            try:
                bound[name] = fit(value, parameter.annotation, parameter.scope)
            except Mismatch as error:
                raise _refused(where, value, str(error)) from None
            _bind_fields(value, where, parameter)
    return bound


def _bind_fields(value: Any, path: str, parameter: Any) -> None:
    """A plain mapping for an argument annotated with a dataclass is bound to that dataclass."""
    if not isinstance(value, Mapping) or TARGET in value:
        return
    for kind in kinds(parameter.annotation, parameter.scope):
        if kind.name == "fields":
            check(value, path, target=f"{kind.scope.name}.{kind.label}")
            return


def _refused(path: str, value: Any, accepted: str) -> UserError:
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    close = nearest(value, accepted.split(", ")) if isinstance(value, str) else []
    hint = f" nearest: {', '.join(close)};" if close else ""
    return UserError(f"{path}: {shown};{hint} accepted: {accepted}")


# ---- what may be built


def _found(target: str, path: str) -> Signature:
    try:
        return signature(target)
    except NotFound as error:
        close = nearest(target, error.near)
        hint = f"nearest: {', '.join(close)}; " if close else ""
        raise UserError(
            f"{_join(path, TARGET)}: no class or function {target!r}; {hint}accepted: the dotted name of one "
            "that exists (a module of yours is looked for in the working folder and on PYTHONPATH)"
        ) from None


def _permitted(mapping: Mapping[str, Any], path: str) -> Signature:
    """The signature of a mapping's target, if it may be built."""
    target = mapping.get(TARGET) if isinstance(mapping, Mapping) else None
    if not isinstance(target, str):
        raise UserError(f"{path or 'config'}: {mapping!r}; accepted: a mapping with {TARGET}: dotted.name")
    if any(part.startswith("_") for part in target.split(".")) or not _allowed(target):
        raise _forbidden(target, path)
    owner = _found(target, path)
    if owner.scope is not None and not _allowed(f"{owner.scope.name}.{target.rpartition('.')[2]}"):
        raise _forbidden(target, path)  # an allowed module imported it from one that is not
    return owner


def _forbidden(target: str, path: str) -> UserError:
    own = "a module of your own" if _trust.user_modules else "a module of your own with --trust"
    names = ", ".join(f"{p}*" for p in _trust.prefixes)
    return UserError(f"{_join(path, TARGET)}: {target!r} may not be built; accepted: {names}, {own}")


def _allowed(target: str) -> bool:
    if target.startswith(_trust.prefixes):
        return True
    return _trust.user_modules and _is_users(target.rpartition(".")[0])


def _is_users(module: str) -> bool:
    """Whether a module is the user's own: neither kdlab's, nor Python's, nor installed."""
    if not module or module.split(".")[0] == "kdlab":
        return False
    path = find(module)
    if path is None:
        return find(module.split(".")[0]) is None  # not there at all: let the lookup say so
    path = path.resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    library = sysconfig.get_paths()
    return not any(path.is_relative_to(Path(library[k]).resolve()) for k in ("stdlib", "platstdlib", "purelib"))


def _resolve(target: str, path: str) -> Any:
    """Import the target, and make sure that it is what the source said."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{_join(path, TARGET)}: importing {target!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not _allowed(f"{found.__module__}.{name}"):
        raise _forbidden(target, path)
    return found


# ---- a config as data


def flatten(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values.

    >>> flatten({"loss": {"alpha": 0.9}, "seed": 0})
    {'loss.alpha': 0.9, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = _join(path, name)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, key))
        else:
            flat[key] = value
    return flat


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, less the keys that change no result (``IRRELEVANT``); 4 is 4.0."""
    kept = {
        key: _canonical(value)
        for key, value in flatten(config).items()
        if not any(key == dropped or key.startswith(f"{dropped}.") for dropped in IRRELEVANT)
        and not (value is None and key in ADDED)
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
