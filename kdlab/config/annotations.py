"""Does a value from the config fit the annotation of the argument it goes to?

Annotations are read as written (``ast``), so this knows the plain ones, unions, ``Literal``, aliases and
dataclasses, and lets anything through that it does not know. A library such as pydantic would check the annotations of
imported functions, and those import torch: 1.4 to 2 s of processor time, where a value of the wrong type is answered
in half a second here, for every job of a sweep, before anything is imported or written.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdlab.config.signatures import Definition, SourceModule, dotted, has_fields, lookup

_LISTS = {
    "list",
    "List",
    "tuple",
    "Tuple",
    "Sequence",
    "MutableSequence",
    "Iterable",
    "Collection",
    "set",
    "Set",
}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping"}
_UNIONS = {"Union", "Optional"}
_TYPING = {"typing", "typing_extensions", "collections.abc"}
_WRAPPERS = {"Annotated", "Final", "Required", "NotRequired"}
_SAID = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "path": "a path",
    "none": "null",
    "list": "a list",
    "mapping": "a mapping",
}


_MOST = 2**63
"""Bound of the integers that may be written as floats (8.0, 1e3)."""


class Mismatch(ValueError):
    """Error for a value that does not fit an annotation; the message says what is accepted."""


@dataclass(frozen=True)
class Kind:
    """One alternative of an annotation: what sort of value, and what its elements must be."""

    name: str
    """Kind: int, float, bool, str, path, none, list, mapping, literal, fields (a dataclass), any, other (class)."""
    scope: SourceModule
    inner: tuple[ast.expr, ...] = ()
    label: str = ""
    definition: Definition | None = None
    slot: str = ""
    """The part of a config that is wanted, where the annotation says so: ``Annotated[dict, "network"]``."""


def kinds(annotation: ast.expr | None, scope: SourceModule) -> list[Kind]:
    """Return the alternatives of an annotation, with aliases followed."""
    return [Kind("any", scope)] if annotation is None else list(_kinds(annotation, scope))


def _kinds(node: ast.expr, scope: SourceModule) -> Iterator[Kind]:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield from _kinds(ast.parse(node.value, mode="eval").body, scope)
        else:
            yield Kind("none" if node.value is None else "any", scope)
    elif isinstance(node, ast.BinOp):
        yield from _kinds(node.left, scope)
        yield from _kinds(node.right, scope)
    elif isinstance(node, ast.Subscript):
        name = _original(dotted(node.value), scope)
        inner = tuple(node.slice.elts) if isinstance(node.slice, ast.Tuple) else (node.slice,)
        if name in _UNIONS:
            for part in inner:
                yield from _kinds(part, scope)
            if name == "Optional":
                yield Kind("none", scope)
        elif name in _WRAPPERS:
            slot = inner[1].value if len(inner) > 1 and isinstance(inner[1], ast.Constant) else ""
            yield from (replace(kind, slot=str(slot)) if slot else kind for kind in _kinds(inner[0], scope))
        elif name == "Literal":
            yield Kind("literal", scope, inner)
        else:
            yield from (k if k.name == "any" else Kind(k.name, scope, inner, name) for k in _named(name, scope))
    else:
        yield from _named(dotted(node), scope)


def _named(full: str, scope: SourceModule) -> Iterator[Kind]:
    name = _original(full, scope)
    if name in ("int", "float", "bool", "str"):
        yield Kind(name, scope)
    elif name in ("Any", "object", ""):
        yield Kind("any", scope)
    elif name in _LISTS:
        yield Kind("list", scope, label=name)
    elif name in _MAPPINGS:
        yield Kind("mapping", scope)
    elif name in ("Path", "PathLike"):
        yield Kind("path", scope)
    elif "." not in full and (hit := _ours(full, scope)):
        where, node = hit
        if isinstance(node, ast.ClassDef):
            yield Kind("fields" if has_fields(node) else "other", where, label=name, definition=node)
        elif isinstance(node, ast.expr):
            yield from _kinds(node, where)
    else:
        yield Kind("other", scope, label=name)


def _original(full: str, scope: SourceModule) -> str:
    """Return the last part of a dotted name; for an alias (``Sequence as Some``), the name that it was imported by."""
    module, own = scope.imports.get(full, ("", None))
    return own if own and module in _TYPING else full.rpartition(".")[2]


def _ours(name: str, scope: SourceModule) -> tuple[SourceModule, Definition | ast.expr] | None:
    """Look up a name of the same top package; reading others (torch, typing) would be slow and say nothing."""
    module = scope.imports[name][0] if name in scope.imports else scope.name
    return lookup(scope, name) if module.split(".")[0] == scope.name.split(".")[0] else None


def fit(value: object, annotation: ast.expr | None, scope: SourceModule) -> Any:
    """Convert ``value`` to what the argument wants: ``"1e-3"`` to a number, 8.0 to an integer, where one is asked for.

    Raises:
        Mismatch: what is accepted instead.
    """
    alternatives = kinds(annotation, scope)
    if any(_fits(value, kind, alternatives) for kind in alternatives):
        return value
    numbers = any(kind.name == "float" for kind in alternatives)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool) and not _finite(value):
        raise Mismatch(describe(alternatives).replace(_SAID["float"], "a finite number", 1))
    for kind in alternatives:
        try:
            return _convert(value, kind)
        except (TypeError, ValueError):
            continue
    raise Mismatch(describe(alternatives))


def _fits(value: object, kind: Kind, alternatives: list[Kind]) -> bool:
    match kind.name:
        case "any":
            return True
        case "none":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
        case "str" | "path":
            return isinstance(value, str)
        case "literal":
            return any(type(value) is type(v) and value == v for v in literals(kind))
        case "list":
            return _fits_list(value, kind)
        case "mapping":
            return _fits_mapping(value, kind)
        case "fields":
            return isinstance(value, Mapping)
    # a class: built from a mapping; beside plain alternatives, a plain value must be one of those
    return (isinstance(value, Mapping) and "_target_" in value) or (len(alternatives) == 1 and value is not None)


def _fits_list(value: object, kind: Kind) -> bool:
    if not isinstance(value, list | tuple):
        return False
    inner = kind.inner
    if not inner:
        return True
    endless = isinstance(inner[-1], ast.Constant) and inner[-1].value is Ellipsis
    if kind.label in ("tuple", "Tuple") and not endless:
        return len(value) == len(inner) and all(_passes(v, a, kind.scope) for v, a in zip(value, inner, strict=True))
    return all(_passes(v, inner[0], kind.scope) for v in value)


def _fits_mapping(value: object, kind: Kind) -> bool:
    if not isinstance(value, Mapping):
        return False
    return (
        len(kind.inner) < 2 or "_target_" in value or all(_passes(v, kind.inner[1], kind.scope) for v in value.values())
    )


def _passes(value: object, annotation: ast.expr, scope: SourceModule) -> bool:
    try:
        fit(value, annotation, scope)
    except Mismatch:
        return False
    return True


def _convert(value: object, kind: Kind) -> Any:
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind.name == "float" and isinstance(value, str) and _finite(float(value)):
        return float(value)
    if kind.name == "int" and isinstance(value, float) and value.is_integer() and abs(value) < _MOST:
        return int(value)
    if kind.name == "str" and plain:
        return str(value)
    raise TypeError


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def literals(kind: Kind) -> list[Any]:
    """Return the values of a ``Literal``."""
    return [ast.literal_eval(node) for node in kind.inner]


def describe(alternatives: list[Kind]) -> str:
    """Describe the accepted values in words: ``a number, null, constant, cosine``."""
    words: list[str] = []
    for kind in alternatives:
        if kind.name == "literal":
            words += [str(v) for v in literals(kind)]
        elif kind.name == "list" and kind.inner:
            of = [k for k in kinds(kind.inner[0], kind.scope) if k.name in ("int", "float", "str", "bool")]
            plural = {"int": "integers", "float": "numbers", "str": "strings", "bool": "true or false"}
            words.append(f"a list of {' or '.join(plural[k.name] for k in of)}" if of else "a list")
        elif kind.name == "fields":
            words.append(f"a mapping ({kind.label})")
        elif kind.name == "other":
            words.append(f"a {kind.label}")
        elif kind.name == "mapping" and any(k.name == "fields" for k in alternatives):
            continue  # said better by the dataclass beside it
        else:
            words.append(_SAID.get(kind.name, "anything"))
    return ", ".join(dict.fromkeys(words))
