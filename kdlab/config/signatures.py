"""What a class or function accepts, read from its source with ``ast``: nothing is imported, nothing is slow.

The signature of whatever a mapping of the config builds is that mapping's schema.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# Their __init__ takes anything and stores nothing; reading torch for that would cost a tenth of a second.
_TAKES_NOTHING = {
    "object",
    "ABC",
    "Generic",
    "Protocol",
    "Module",
    "LightningModule",
    "LightningDataModule",
    "Dataset",
}

_NO_PARTS = {"object", "ABC", "Generic", "Protocol", "NamedTuple", "TypedDict", "Enum", "Exception"}
"""Bases of the standard library, which derive from no part of an experiment."""

_NOT_READ = {"torch", "lightning", "transformers", "torchmetrics", "typing", "abc", "enum", "collections"}
"""Packages whose base classes are not looked up in their source."""


class NotFound(LookupError):
    """Error for a missing module, or a name missing in it; ``near`` are the dotted names that do exist there."""

    def __init__(self, target: str, near: list[str]) -> None:
        super().__init__(target)
        self.near = near


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation as written, and the module in which those names mean something."""

    name: str
    annotation: ast.expr | None
    required: bool
    scope: SourceModule


@dataclass(frozen=True)
class Signature:
    """The arguments that ``target`` accepts by keyword."""

    target: str
    parameters: dict[str, Parameter]
    open: bool = False
    """Whether it accepts further keywords that cannot be known from the source."""
    scope: SourceModule | None = None
    """The module that defines it, which may not be the one it was imported from."""
    definition: Definition | ast.expr | None = None
    """Its class or function there; an expression where it is made by a call."""

    @property
    def defined(self) -> str:
        """Its dotted name where it is defined; empty where it is made by a call."""
        if self.scope is None or not isinstance(self.definition, Definition):
            return ""
        return f"{self.scope.name}.{self.definition.name}"


@dataclass
class SourceModule:
    """One parsed module: what it defines, names and imports at the top level."""

    name: str
    path: Path
    definitions: dict[str, Definition] = field(default_factory=dict)
    values: dict[str, ast.expr] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local name → (module, name in it), or (module, None) for the module itself."""
    stars: list[str] = field(default_factory=list)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def names(self) -> list[str]:
        """Public names that it defines or imports from elsewhere in the same package."""
        top = self.name.split(".")[0]
        own = [n for n, (module, name) in self.imports.items() if name and module.split(".")[0] == top]
        return sorted(n for n in [*self.definitions, *own] if not n.startswith("_"))


def find(module: str) -> Path | None:
    """Return the source file of a module, without importing it or its packages; None if there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level name: nothing is imported
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for part in rest:
        for folder in folders:
            if (folder / part / "__init__.py").is_file():
                folders, file = [folder / part], folder / part / "__init__.py"
                break
            if (folder / f"{part}.py").is_file():
                folders, file = [], folder / f"{part}.py"
                break
        else:
            return None
    return file


@cache
def source(module: str) -> SourceModule | None:
    """Parse a module, once in a process."""
    path = find(module)
    if path is None:
        return None
    parsed = SourceModule(module, path)
    for node in _statements(ast.parse(path.read_bytes(), filename=str(path)).body):
        if isinstance(node, Definition):
            parsed.definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            parsed.values.update({t.id: node.value for t in node.targets if isinstance(t, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            parsed.values[node.target.id] = node.value
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                parsed.imports[alias.asname or name] = (name, None)
        elif isinstance(node, ast.ImportFrom):
            _read_import(parsed, node)
    return parsed


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _read_import(importer: SourceModule, node: ast.ImportFrom) -> None:
    base = node.module or ""
    if node.level:
        parts = importer.name.split(".")
        # "." is the package itself: a package's __init__ is one step nearer to it than its modules are
        steps = node.level - (importer.path.name == "__init__.py")
        base = ".".join([*parts[: len(parts) - steps], *([base] if base else [])])
    for alias in node.names:
        if alias.name == "*":
            importer.stars.append(base)
        else:
            importer.imports[alias.asname or alias.name] = (base, alias.name)


def lookup(
    scope: SourceModule, name: str, _seen: frozenset = frozenset()
) -> tuple[SourceModule, Definition | ast.expr] | None:
    """Find the definition of ``name`` as seen from a module, through imports and plain aliases."""
    if (scope.name, name) in _seen:
        return None
    seen = _seen | {(scope.name, name)}
    if name in scope.definitions:
        return scope, scope.definitions[name]
    if name in scope.values:
        value = scope.values[name]
        if isinstance(value, ast.Name | ast.Attribute):
            return _lookup_expression(scope, value, seen) or (scope, value)
        return scope, value
    if name in scope.imports:
        module, inner = scope.imports[name]
        there = source(module) if inner else None
        return lookup(there, inner, seen) if there and inner else None
    for module in scope.stars:
        there = source(module)
        definition = lookup(there, name, seen) if there else None
        if definition:
            return definition
    return None


def _lookup_expression(
    scope: SourceModule, node: ast.expr, seen: frozenset = frozenset()
) -> tuple[SourceModule, Definition | ast.expr] | None:
    """Find the definition that a ``Name`` or a dotted ``a.b.Name`` points at."""
    if isinstance(node, ast.Name):
        return lookup(scope, node.id, seen)
    parts = dotted(node).split(".")
    if len(parts) < 2 or parts[0] not in scope.imports:
        return None
    module, inner = scope.imports[parts[0]]
    path = ".".join([module, *([inner] if inner else []), *parts[1:-1]])
    there = source(path)
    return lookup(there, parts[-1], seen) if there else None


def dotted(node: ast.expr) -> str:
    """Return the dotted text ``a.b.c`` of a Name or Attribute, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def derives(
    scope: SourceModule, node: ast.ClassDef, names: tuple[str, ...], _seen: frozenset[tuple[str, int]] = frozenset()
) -> bool | None:
    """Return whether a class derives from (or is) one of ``names``, the dotted names of a class.

    None means that it may: torch and lightning are slow to read, and their classes are asked once they are imported.
    """
    if f"{scope.name}.{node.name}" in names:
        return True
    if (scope.name, node.lineno) in _seen:
        return None  # a class that takes the name of its base
    seen = _seen | {(scope.name, node.lineno)}
    unknown = False
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        full = _full_name(scope, plain)
        if full in names:
            return True
        if full.rpartition(".")[2] in _NO_PARTS:
            continue
        if full.split(".")[0] in _NOT_READ:
            unknown |= names[0].startswith("torch.")  # none of these derives from a class of kdlab's
            continue
        definition = _lookup_expression(scope, plain)
        inner = derives(*definition, names, seen) if definition and isinstance(definition[1], ast.ClassDef) else None  # type: ignore[arg-type]
        if inner:
            return True
        unknown |= inner is None
    return None if unknown else False


def _full_name(scope: SourceModule, node: ast.expr) -> str:
    """Return the dotted name of a base class, its imports followed one step: ``nn.Module`` as ``torch.nn.Module``."""
    first, _, rest = dotted(node).partition(".")
    if first in scope.definitions or first in scope.values or first not in scope.imports:
        return f"{scope.name}.{dotted(node)}"
    module, name = scope.imports[first]
    return ".".join(filter(None, (module, name, rest)))


@cache
def signature(target: str) -> Signature:
    """Return the signature of a dotted name such as ``kdlab.losses.KL``.

    Raises:
        NotFound: no such module, or no class or function of that name in it.
    """
    module, _, name = target.rpartition(".")
    scope = source(module) if module else None
    if scope is None:
        top = source(module.split(".")[0]) if module else None
        raise NotFound(target, [f"{top.name}.{n}" for n in top.names] if top else [])
    definition = lookup(scope, name)
    if definition is None:
        raise NotFound(target, [f"{module}.{n}" for n in scope.names])
    where, node = definition
    parameters, is_open = _parameters(where, node)
    return Signature(target, parameters, is_open, where, node)


def _parameters(scope: SourceModule, node: Definition | ast.expr) -> tuple[dict[str, Parameter], bool]:
    if isinstance(node, ast.ClassDef):
        return _of_class(scope, node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return _of_function(scope, node, None)
    return {}, True  # made by a call, such as functools.partial: cannot be known


def _of_class(scope: SourceModule, node: ast.ClassDef) -> tuple[dict[str, Parameter], bool]:
    if has_fields(node):
        return _of_fields(scope, node)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _of_function(scope, statement, node)
    return _of_base(scope, node)


def _of_base(scope: SourceModule, node: ast.ClassDef) -> tuple[dict[str, Parameter], bool]:
    for base in node.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if dotted(plain).rpartition(".")[2] in _TAKES_NOTHING:
            continue
        definition = _lookup_expression(scope, plain)
        return _parameters(*definition) if definition else ({}, True)
    return {}, False


def has_fields(node: ast.ClassDef) -> bool:
    """Return whether a class takes its annotated fields as arguments: a dataclass, NamedTuple or TypedDict."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(dotted(d).rpartition(".")[2] == "dataclass" for d in decorators) or any(
        dotted(b).rpartition(".")[2] in ("NamedTuple", "TypedDict") for b in node.bases
    )


def _of_fields(scope: SourceModule, node: ast.ClassDef) -> tuple[dict[str, Parameter], bool]:
    parameters: dict[str, Parameter] = {}
    for base in reversed(node.bases):
        definition = _lookup_expression(scope, base)
        if definition and isinstance(definition[1], ast.ClassDef) and has_fields(definition[1]):
            parameters.update(_of_fields(definition[0], definition[1])[0])
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        default = statement.value
        hidden = isinstance(default, ast.Call) and any(
            k.arg == "init" and isinstance(k.value, ast.Constant) and not k.value.value for k in default.keywords
        )
        if not hidden and "ClassVar" not in ast.unparse(statement.annotation):
            name = statement.target.id
            parameters[name] = Parameter(name, statement.annotation, default is None, scope)
    return parameters, False


def _of_function(
    scope: SourceModule, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.ClassDef | None
) -> tuple[dict[str, Parameter], bool]:
    given = node.args
    positional = given.args[1:] if owner else given.args
    optional = len(given.defaults)
    parameters = {
        a.arg: Parameter(a.arg, a.annotation, i < len(positional) - optional, scope) for i, a in enumerate(positional)
    }
    for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters[a.arg] = Parameter(a.arg, a.annotation, default is None, scope)
    if given.kwarg is None:
        return parameters, False
    passed_on, is_open = _passed_on(scope, node, owner, given.kwarg.arg)
    # its own first: positional arguments of a call are matched in this order
    return {**parameters, **{k: p for k, p in passed_on.items() if k not in parameters}}, is_open


def _passed_on(
    scope: SourceModule, node: ast.FunctionDef | ast.AsyncFunctionDef, owner: ast.ClassDef | None, rest: str
) -> tuple[dict[str, Parameter], bool]:
    """Return the parameters that ``**rest`` may hold: those of the call that it is passed to."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        if not any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == rest for k in call.keywords):
            continue
        if owner is not None and ast.unparse(call.func) == "super().__init__":
            accepted = _of_base(scope, owner)
        else:
            there = _lookup_expression(scope, call.func)
            accepted = _parameters(*there) if there else ({}, True)
        fixed = {k.arg for k in call.keywords} | set(list(accepted[0])[: len(call.args)])
        return {name: p for name, p in accepted[0].items() if name not in fixed}, accepted[1]
    return {}, True
