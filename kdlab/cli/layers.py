"""The layers of two networks, with the shapes that they put out, and pairs of them that are alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass
class Layer:
    """One module of a network, and what it put out for one example."""

    path: str
    kind: str
    shape: tuple[int, ...] | None = None
    """Shape of its output, without the batch; None where the forward pass does not come by."""
    order: int = -1
    """Place of its last answer among those of all modules; -1 if it gave none."""
    calls: int = 0

    @property
    def said(self) -> str:
        """Shape of its output, as it is shown; empty if there is none."""
        return "" if self.shape is None else " x ".join(map(str, self.shape))


class Traced(NamedTuple):
    """Shapes and modules of a network, seen in one forward pass."""

    layers: list[Layer]
    penultimate: Layer | None
    """Layer that gives the classifier its input, if that is a vector."""
    side: int | None
    """Height of the picture that went in."""
    last: Layer | None = None
    """Layer with the feature map that comes last before that vector."""


class Pairs(NamedTuple):
    """Layers of student and teacher that can be compared, from shallow to deep."""

    what: str
    each: list[tuple[str, Layer, Layer]]
    """Pairs: what the two layers have in common, the student's, the teacher's."""


def trace(net: Any, example: Any) -> Traced:
    """Trace the layers of ``net`` through one forward pass on one example, in evaluation mode."""
    import torch

    from kdlab.errors import UserError
    from kdlab.models.transforms.surgery import head_of

    layers = {path: Layer(path, type(module).__name__) for path, module in net.named_modules() if path}
    outputs: dict[str, Any] = {}
    given: list[Any] = []
    clock = count()

    def note(path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                layer = layers[path]
                layer.shape, layer.order, layer.calls = tuple(first.shape[1:]), next(clock), layer.calls + 1
                outputs.pop(path, None)  # to the end
                outputs[path] = first

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in net.named_modules() if path]
    with suppress(UserError):  # there may be nothing that could be a classifier
        handles.append(head_of(net)[1].register_forward_pre_hook(lambda _, args: given.extend(args[:1])))
    with torch.no_grad():
        net.eval()(**example) if isinstance(example, dict) else net.eval()(example)
    for handle in handles:
        handle.remove()
    vectors = [layers[p] for p, y in outputs.items() if any(y is x for x in given) and y.ndim == 2]
    side = example.shape[2] if isinstance(example, torch.Tensor) and example.ndim == 4 else None
    last = _last_map(layers.values(), vectors[-1]) if vectors else None
    return Traced(list(layers.values()), vectors[-1] if vectors else None, side, last)


def _last_map(layers: Iterable[Layer], vector: Layer) -> Layer | None:
    """Return the feature map that came last before a vector, and not inside of what made that."""
    inside = f"{vector.path}."
    maps = [layer for layer in layers if layer.shape is not None and len(layer.shape) == 3]
    before = [layer for layer in maps if layer.order < vector.order and not layer.path.startswith(inside)]
    return max(before, key=lambda layer: layer.order, default=None)


def suggest(student: Traced, teacher: Traced) -> list[Pairs]:
    """Suggest pairs of layers of student and teacher.

    By resolution (stages of feature maps), by depth (blocks of hidden states), the last maps where no stage gives them
    and they are equally wide (SimKD's projector), and the penultimate vectors.
    """
    suggested = [_by_resolution(student, teacher), *_by_depth(student, teacher)]
    student_map, teacher_map = student.last, teacher.last
    stages = [layer.path for _, layer, _ in suggested[0].each]
    if (
        student_map is not None
        and teacher_map is not None
        and student_map.path not in stages
        and _width(student_map) == _width(teacher_map)
    ):
        suggested.append(Pairs("last feature maps", [("", student_map, teacher_map)]))
    if student.penultimate is not None and teacher.penultimate is not None:
        suggested.append(Pairs("penultimate vectors", [("", student.penultimate, teacher.penultimate)]))
    return [pairs for pairs in suggested if pairs.each]


def _width(layer: Layer) -> int:
    assert layer.shape is not None
    return layer.shape[0]


def overrides(
    pairs: Pairs, terms: Mapping[str, Any], fits: Callable[[str, Mapping[str, Any]], bool] = lambda name, term: True
) -> list[str]:
    """Return overrides for these pairs: for every term of the loss that takes some, or for one called NAME.

    Args:
        pairs: pairs of layers.
        terms: name → configuration.
        fits: function that says whether a term, configured for these layers, takes them.
    """
    student_paths, teacher_paths = ([layer.path for layer in side] for side in list(zip(*pairs.each, strict=True))[1:])
    layers: dict[str, Any] = {"student_layer": student_paths, "teacher_layer": teacher_paths}
    takers = {name: term for name, term in terms.items() if isinstance(term, Mapping) and "student_layer" in term}
    if not takers:
        return [_line("NAME", layers)]
    lines = []
    for name, term in takers.items():
        given = {key: paths for key, paths in layers.items() if key in term}
        # some terms take one layer, and no list
        forms = [given, {key: paths[0] for key, paths in given.items()}] if len(student_paths) == 1 else [given]
        lines += [_line(name, form) for form in forms if fits(name, {**term, **form})][:1]
    return lines


def _line(name: str, given: Mapping[str, Any]) -> str:
    return " ".join(f"loss.terms.{name}.{key}={_typed(paths)}" for key, paths in given.items())


def _typed(paths: str | Sequence[str]) -> str:
    return paths if isinstance(paths, str) else f"[{','.join(paths)}]"


# ---- feature maps ----------------------------------------------------------------------------------------------------


def _by_resolution(student: Traced, teacher: Traced) -> Pairs:
    student_stages, teacher_stages = _stages(student.layers), _stages(teacher.layers)
    shared = sorted(student_stages.keys() & teacher_stages.keys(), reverse=True)
    pairs = [(_share(student.side, at), student_stages[at], teacher_stages[at]) for at in shared]
    return Pairs("feature maps by resolution", pairs)


def _share(side: int | None, at: tuple[int, int]) -> str:
    """Return a resolution, as a share of the input's where it is a whole part of that."""
    if side is None or side % at[0]:
        return f"{at[0]} x {at[1]}"
    return f"1/{side // at[0]}"


def _stages(layers: Iterable[Layer]) -> dict[tuple[int, int], Layer]:
    """Return the last stage of each resolution.

    Stages are the numbered siblings that come at most resolutions (``layer1``, ``layer2``, ...; ``features.0``, ...),
    the outermost such; in a network without, the outermost modules.
    """
    maps = [layer for layer in layers if layer.shape is not None and len(layer.shape) == 3 and layer.calls == 1]
    families = _families(maps)
    best = max(families.values(), key=lambda f: (len({_grid(m) for m in f}), -f[0].path.count("."), len(f)), default=[])
    if len({_grid(layer) for layer in best}) < 2:
        outermost = min((layer.path.count(".") for layer in maps), default=0)
        best = [layer for layer in maps if layer.path.count(".") == outermost]
    return {_grid(layer): layer for layer in sorted(best, key=lambda layer: layer.order)}


def _grid(layer: Layer) -> tuple[int, int]:
    assert layer.shape is not None
    return layer.shape[1], layer.shape[2]


def _families(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Group the layers whose paths differ in the number at the end alone."""
    families: dict[str, list[Layer]] = {}
    for layer in layers:
        if match := _NUMBERED.fullmatch(layer.path):
            families.setdefault(match[1], []).append(layer)
    return families


# ---- hidden states ---------------------------------------------------------------------------------------------------


def _by_depth(student: Traced, teacher: Traced) -> list[Pairs]:
    student_blocks, teacher_blocks = _blocks(student.layers), _blocks(teacher.layers)
    if len(student_blocks) == len(teacher_blocks):  # decoders, or encoders and decoders, whatever they are called
        matched = list(zip(student_blocks, teacher_blocks, strict=True))
    else:
        matched = [(stem, stem) for stem in student_blocks if stem in teacher_blocks]
    return [
        Pairs(f"hidden states by depth ({s.rstrip('.')})", _spread(student_blocks[s], teacher_blocks[t]))
        for s, t in matched
    ]


def _blocks(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Return the outermost lists of blocks that put out hidden states (T, d), in the order in which they answer."""
    hidden = [layer for layer in layers if layer.shape is not None and len(layer.shape) == 2 and layer.calls == 1]
    lists = {stem: members for stem, members in _families(hidden).items() if stem.endswith(".")}
    members = [layer.path for family in lists.values() for layer in family]
    outer = {stem: f for stem, f in lists.items() if not any(stem.startswith(f"{path}.") for path in members)}
    return dict(sorted(outer.items(), key=lambda item: item[1][0].order))


def _spread(student_blocks: list[Layer], teacher_blocks: list[Layer]) -> list[tuple[str, Layer, Layer]]:
    """Return as many pairs as the shallower has blocks, at even shares of both depths, the last with the last."""
    number = min(len(student_blocks), len(teacher_blocks))

    def at(blocks: list[Layer], n: int) -> Layer:
        return blocks[int(n * len(blocks) / number + 0.5) - 1]

    return [(f"{n}/{number}", at(student_blocks, n), at(teacher_blocks, n)) for n in range(1, number + 1)]
