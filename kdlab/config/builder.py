"""From a mapping of the config to the object it describes, and nothing else that the config could name.

``check`` binds every mapping to the signature of its owner without importing it; ``build`` is the one
function that makes objects. What may be built depends on where it stands (:mod:`kdlab.config.slots`): a ``_target_``
that is no such part is refused, and so is a name that an allowed module merely imported.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

from kdlab.config.annotations import Mismatch, fit, kinds
from kdlab.config.renamed import TARGETS, current
from kdlab.config.signatures import NotFound, Signature, signature
from kdlab.config.slots import OWN, SLOTS, Place, Slot, accepts, accepts_object, base_class, described, named
from kdlab.config.trust import allowed, is_own, read_only, trust
from kdlab.errors import RunFailed, UserError, nearest, unknown

__all__ = ["bind", "build", "check", "config_hash", "flatten", "parameters", "signature", "trust"]

TARGET = "_target_"

TEXT = ("vocab_size", "context", "eos_id", "pad_id", "mels", "frames")
"""Arguments of a network that the tokenizer, the sequence length and the size of sound features determine."""

OUT_OF_RANGE = (ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError)
"""Errors that constructors raise at values that their annotations allow."""

LIBRARIES = ("kdlab.", "torch.")
"""Packages whose constructors' refusals are about the values that they are given, and no defect of the user's code."""

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


ADDED = ("steps", "teacher.weights", "pretrained.weights")
"""Keys that earlier versions did not have: left out of the hash where they are null, so that their runs go on."""


def check(
    mapping: Mapping[str, Any],
    path: str = "",
    *,
    slot: str = "",
    target: str | None = None,
    supplied: Collection[str] = SUPPLIED,
) -> None:
    """Bind a mapping, and all mappings inside it, to their owners' signatures; nothing is imported or built.

    Args:
        mapping: mapping with a ``_target_``, unless ``target`` names its owner.
        path: place in the config, for messages.
        slot: the part of :data:`kdlab.config.slots.SLOTS` that it must be, or ``own`` for any.
        target: dotted name of the owner of a plain mapping (a dataclass or function).
        supplied: arguments that may be null because code gives them.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a target that is not there or not allowed here.
    """
    if target is not None:  # code gives nothing to a plain mapping
        _check(_found(target, path), mapping, path, supplied, ())
    else:
        _check(_permitted(mapping, path, _slots(slot)), mapping, path, supplied, supplied)


def _check(
    owner: Signature, mapping: Mapping[str, Any], path: str, supplied: Collection[str], own: Collection[str]
) -> None:
    """Bind a mapping, and what is inside; ``own`` are its keys that may be null, ``supplied`` those inside."""
    given = {k: v for k, v in mapping.items() if k != TARGET}
    _bind(owner, given, path, own)
    for name, value in given.items():
        _check_inside(value, _join(path, name), supplied, _place(owner, name))


def _check_inside(value: object, path: str, supplied: Collection[str], place: Place) -> None:
    if isinstance(value, Mapping):
        if TARGET in value:
            _check(_permitted(value, path, place.slots), value, path, supplied, supplied)
        else:
            for name, inner in value.items():
                _check_inside(inner, _join(path, name), supplied, place.inside(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_inside(inner, f"{path}[{i}]", supplied, place.inside())


def build(
    mapping: Mapping[str, Any],
    path: str = "",
    /,
    *,
    slot: str,
    offer: Mapping[str, Any] | None = None,
    **from_code: Any,
) -> Any:
    """Build what a mapping with ``_target_`` describes, mappings inside it first.

    Args:
        mapping: ``{_target_: dotted.name, argument: value, ...}``.
        path: place in the config, for messages.
        slot: the part of :data:`kdlab.config.slots.SLOTS` that it must be, or ``own`` for any.
        offer: arguments that it gets if its signature wants them and the config leaves them out or null; a network
            inside it, for an argument that is an ``nn.Module``, likewise. They are given as they are, nothing is built.
        **from_code: arguments that it always gets.

    Raises:
        UserError: as :func:`check`; an argument that is missing; or what the constructor itself refuses.
    """
    return _build(mapping, path, _slots(slot), offer, from_code)


def _build(
    mapping: Mapping[str, Any],
    path: str,
    slots: tuple[Slot, ...],
    offer: Mapping[str, Any] | None = None,
    from_code: Mapping[str, Any] | None = None,
) -> Any:
    owner = _permitted(mapping, path, slots)
    offer, from_code = dict(offer or {}), dict(from_code or {})
    given = _bind(owner, {k: v for k, v in mapping.items() if k != TARGET}, path, (*SUPPLIED, *offer))
    offered = {n: v for n, v in offer.items() if n in owner.parameters and given.get(n) is None}
    for name in from_code:
        if name not in owner.parameters and not owner.open:
            raise UserError(_join(path, TARGET), f"{owner.target} takes no argument {name!r}, which kdlab gives it")
    known = {**given, **offered, **from_code}
    missing = [n for n, p in owner.parameters.items() if p.required and n not in known]
    if missing:
        raise UserError(_join(path, missing[0]), f"missing; {owner.target} needs {', '.join(missing)}")
    made = {}
    for name, value in given.items():
        place = _place(owner, name)
        made[name] = _build_inside(value, _join(path, name), place, offer if place.wants_network else None)
    return _made(owner, path, slots, {**made, **offered, **from_code})


def _build_inside(value: object, path: str, place: Place, offer: Mapping[str, Any] | None = None) -> Any:
    if isinstance(value, Mapping):
        if TARGET in value:
            return _build(value, path, place.slots, offer)
        return {name: _build_inside(inner, _join(path, name), place.inside(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_build_inside(inner, f"{path}[{i}]", place.inside()) for i, inner in enumerate(value)]
    return value


def _made(owner: Signature, path: str, slots: tuple[Slot, ...], arguments: Mapping[str, Any]) -> Any:
    """Call the target, and make sure that it made what is wanted."""
    target = _resolve(owner.target, path, slots)
    try:
        made = target(**arguments)
    except UserError as error:
        raise _placed(error, path, owner) from None
    except OUT_OF_RANGE as error:
        if isinstance(error, RunFailed) or not (read_only() or owner.target.startswith(LIBRARIES)):
            raise
        raise _not_made(owner, path, error) from error
    except Exception as error:
        if not read_only():
            raise
        raise _not_made(owner, path, error) from error
    # what derives from another class is refused before; a function of the user's shows what it makes only now
    if len(slots) == 1 and slots[0].base and not isinstance(made, base_class(slots[0])):
        raise UserError(
            _join(path, TARGET), f"{owner.target!r} made a {type(made).__name__}", f"{slots[0].what} ({slots[0].base})"
        )
    return made


def _not_made(owner: Signature, path: str, error: Exception) -> UserError:
    """Turn an error of a library ("Invalid learning rate: -1"), of arithmetic or of memory into a message."""
    reason = (str(error).split("Exception raised from")[0].splitlines() or [type(error).__name__])[0]
    return UserError(
        path or "config",
        f"{owner.target} cannot be built with these values ({reason})",
        "values that it takes, and a size that fits into memory",
    )


def _placed(error: UserError, path: str, owner: Signature) -> UserError:
    """Return the constructor's error with the place in the config where it happened."""
    if not path or error.key.startswith(path.split(".")[0]):
        return error
    return error.under(path) if error.key.split(".")[0] in owner.parameters else UserError(path, str(error))


def parameters(mapping: Mapping[str, Any], path: str, *, slot: str) -> set[str]:
    """Return the names of the arguments that a part takes, and of those that the parts inside of it take.

    Raises:
        UserError: as :func:`check`, of its target.
    """
    return _parameters(mapping, path, _slots(slot))


def _parameters(mapping: Mapping[str, Any], path: str, slots: tuple[Slot, ...]) -> set[str]:
    owner = _permitted(mapping, path, slots)
    names = set(owner.parameters)
    for name, value in mapping.items():
        if isinstance(value, Mapping) and TARGET in value:
            names |= _parameters(value, _join(path, name), _place(owner, name).slots)
    return names


def bind(mapping: Mapping[str, Any], path: str = "", *, target: str) -> dict[str, Any]:
    """Convert the values of a plain mapping to what the fields of ``target`` want, such as ``3`` to a string.

    What is inside of them is not looked at.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    return _bind(_found(target, path), mapping, path, ())


def _bind(owner: Signature, given: Mapping[str, Any], path: str, supplied: Collection[str]) -> dict[str, Any]:
    """Convert values to what the owner's annotations want."""
    bound = {}
    for name, value in given.items():
        where = _join(path, name)
        parameter = owner.parameters.get(name)
        if parameter is None:
            if not owner.open:
                if (now := current(where)) is not None:
                    raise UserError(where, "has another name", now)
                raise unknown(where, name, owner.parameters, f"key of {owner.target}")
            bound[name] = value
        elif value == "???":
            raise UserError(where, "not set; give it a value")
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
    """Bind a plain mapping to the dataclass that its argument is annotated with, if it is."""
    if not isinstance(value, Mapping) or TARGET in value:
        return
    for kind in kinds(parameter.annotation, parameter.scope):
        if kind.name == "fields":
            bind(value, path, target=f"{kind.scope.name}.{kind.label}")
            return


def _refused(path: str, value: object, accepted: str) -> UserError:
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    close = nearest(value, accepted.split(", ")) if isinstance(value, str) else []
    hint = f"; nearest: {', '.join(close)}" if close else ""
    return UserError(path, f"{shown}{hint}", accepted)


# ---- what may be built


def _found(target: str, path: str) -> Signature:
    try:
        return signature(target)
    except NotFound as error:
        close = nearest(target, error.near)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise UserError(
            _join(path, TARGET),
            f"no class or function {target!r}{hint}",
            "the dotted name of one that exists"
            " (a module of yours is looked for in the working folder and on PYTHONPATH)",
        ) from None


def _slots(name: str) -> tuple[Slot, ...]:
    return (OWN if name == "own" else SLOTS[name],)


def _place(owner: Signature, name: str) -> Place:
    """Return the place of an owner's argument."""
    if name in owner.parameters:
        return Place.of(owner.parameters[name], is_own)
    return Place(own=owner.scope is not None and is_own(owner.scope.name))


def _permitted(mapping: Mapping[str, Any], path: str, slots: tuple[Slot, ...]) -> Signature:
    """Return the signature of a mapping's target, if it may be built here."""
    target = mapping.get(TARGET) if isinstance(mapping, Mapping) else None
    if not isinstance(target, str):
        raise UserError(path or "config", f"{mapping!r}", f"a mapping with {TARGET}: dotted.name")
    if target in TARGETS:
        raise UserError(_join(path, TARGET), f"{target!r} has another name", TARGETS[target])
    hidden = any(part.startswith("_") for part in target.split("."))
    if hidden or not (slots and (named(slots, target) or is_own(target.rpartition(".")[0]))):
        raise _forbidden(target, path, slots)
    owner = _found(target, path)
    if not any(accepts(slot, owner, is_own) for slot in slots):
        raise _forbidden(target, path, slots)
    return owner


def _forbidden(target: str, path: str, slots: tuple[Slot, ...]) -> UserError:
    hint = "" if allowed().user_modules else " (--trust builds those of a folder made elsewhere)"
    accepted = f"{described(slots)}, or of a module of your own{hint}" if slots else "a plain value"
    return UserError(_join(path, TARGET), f"{target!r} may not be built here", accepted)


def _resolve(target: str, path: str, slots: tuple[Slot, ...]) -> Any:
    """Import the target, and make sure that it is what the source said."""
    module, _, name = target.rpartition(".")
    try:
        target_object = getattr(importlib.import_module(module), name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_join(path, TARGET), f"importing {target!r} failed: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(target_object) or inspect.isfunction(target_object)):
        raise _forbidden(target, path, slots)
    if not any(accepts_object(slot, target_object, is_own) for slot in slots):
        raise _forbidden(target, path, slots)
    return target_object


# ---- a config as data


def flatten(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; lists stay values.

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
    """Return the SHA-256 of a resolved config, less the keys that change no result (``IRRELEVANT``); 4 is 4.0."""
    kept = {
        key: _canonical(value)
        for key, value in flatten(config).items()
        if not any(key == dropped or key.startswith(f"{dropped}.") for dropped in IRRELEVANT)
        and not (value is None and key in ADDED)
    }
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: object) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
