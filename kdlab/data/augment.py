"""Augmentation as batched tensor operations, each a function of (seed, example, view).

A *view* numbers the ways in which one example can be shown. Asking for (example, view) again gives the same picture,
in any batch and on any worker, so a view can be shown to teacher and student alike, cached, and repeated. Which view
an epoch shows is decided in :mod:`kdlab.data.order`; here a view number becomes a picture, in one of two ways:

- *hashed*: every random choice is drawn from the hash of (seed, example, view). View numbers have no end.
- *enumerated* (``views="all"``): transforms with finitely many outcomes are counted through; the view number spells
  out which outcome of each. A crop with padding 4 and a flip make 9 x 9 x 2 = 162 views, the same for every example.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from kdlab.data.mixing import CutMix, Mixing, MixUp
from kdlab.data.ops import OPS, affine, apply_ops, sample
from kdlab.errors import UserError, unknown
from kdlab.functional.rng import Draws
from kdlab.ranges import share


class Transform:
    """One random change of pictures.

    ``__call__`` takes images (B, C, H, W), uint8 or float in [0, 1], and one family of draws a row, and returns new
    images of the same shape. ``finite`` is the number of distinct outcomes, None if there is no end to them.
    """

    finite: int | None = None
    takes_bytes = False
    """Whether the transform accepts uint8 images; else they are converted to float in [0, 1] first."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the transformed images, (B, C, H, W)."""
        raise TypeError(f"{type(self).__name__} does not say what it does: define __call__")


class Finite(Transform):
    """A transform that has ``finite`` outcomes; subclasses say how outcome k in 0 .. finite-1 looks."""

    finite: int
    takes_bytes = True

    @override
    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return self.apply(images, draws.integers(0, self.finite))

    def apply(self, images: Tensor, outcome: Tensor) -> Tensor:
        """Transform images (B, C, H, W) by outcome (B,) int64."""
        raise TypeError(f"{type(self).__name__} does not say what it does: define apply")


class Crop(Finite):
    """Random crop: pad, then cut the picture's size out again at one of (2·padding + 1)² places.

    Args:
        padding: pixels on each side; None is an eighth of the height (4 for 32 x 32).
        fill: ``zero`` (black) or ``reflect``.
    """

    def __init__(self, height: int, width: int, padding: int | None = None, fill: str = "zero") -> None:
        if fill not in ("zero", "reflect"):
            raise unknown("data.augment.crop.fill", fill, ["zero", "reflect"])
        padding = max(1, height // 8) if padding is None else padding
        limit = min(height, width) - 1
        if not 0 < padding <= limit:
            raise UserError("data.augment.crop.padding", padding, f"1..{limit}")
        self.padding, self.fill = padding, fill
        self.finite = (2 * padding + 1) ** 2

    @override
    def apply(self, images: Tensor, outcome: Tensor) -> Tensor:
        side = 2 * self.padding + 1
        windows = self._padded(images).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
        rows = torch.arange(len(images), device=images.device)
        return windows[rows, :, outcome // side, outcome % side]

    def _padded(self, images: Tensor) -> Tensor:
        if self.fill == "zero":
            return F.pad(images, (self.padding,) * 4)
        for axis in (2, 3):  # by hand, for F.pad reflects no bytes
            size = images.shape[axis]
            place = torch.arange(-self.padding, size + self.padding, device=images.device).abs()
            place = torch.where(place >= size, 2 * size - 2 - place, place)
            images = images.index_select(axis, place)
        return images


class Flip(Finite):
    """Random mirroring of left and right, every second time."""

    finite = 2

    @override
    def apply(self, images: Tensor, outcome: Tensor) -> Tensor:
        # picking whole pictures out of both versions costs a quarter of choosing pixel by pixel
        both = torch.cat([images, images.flip(-1)])
        return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * outcome)


class Cutout(Finite):
    """Black square around a random pixel; at the border part of the square falls outside.

    DeVries and Taylor, "Improved regularization of convolutional neural networks with Cutout", 2017.

    Args:
        size: side of the square in pixels; None is half the height.
    """

    def __init__(self, height: int, width: int, size: int | None = None) -> None:
        size = max(1, height // 2) if size is None else size
        if not 0 < size <= 2 * max(height, width):
            raise UserError("data.augment.cutout.size", size, f"1..{2 * max(height, width)}")
        self.size = size
        self.finite = height * width

    @override
    def apply(self, images: Tensor, outcome: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        low, high = -(self.size // 2), self.size - self.size // 2
        y = torch.arange(height, device=images.device) - (outcome // width)[:, None]
        x = torch.arange(width, device=images.device) - (outcome % width)[:, None]
        hole = ((y >= low) & (y < high))[:, None, :, None] & ((x >= low) & (x < high))[:, None, None, :]
        return images * ~hole


class RandomResizedCrop(Transform):
    """Random box that is enlarged to the picture's size, bilinearly (Szegedy et al., CVPR 2015).

    Args:
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.
    """

    def __init__(
        self,
        height: int,
        width: int,
        scale: Sequence[float] = (0.25, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        for name, pair, top in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
                bound = "0 < low <= high" + (" <= 1" if top == 1.0 else "")
                raise UserError(f"data.augment.random_resized_crop.{name}", f"{list(pair)}", f"[low, high], {bound}")
        self.scale, self.ratio = tuple(map(float, scale)), tuple(map(float, ratio))

    @override
    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        area = draws.uniform(0, *self.scale) * (height * width)
        aspect = draws.uniform(1, math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        # a box that is too long for the picture is cut to it
        share_x = ((area * aspect).sqrt() / width).clamp(max=1)
        share_y = ((area / aspect).sqrt() / height).clamp(max=1)
        shift_x = (2 * draws.uniform(2) - 1) * (1 - share_x)
        shift_y = (2 * draws.uniform(3) - 1) * (1 - share_y)
        return sample(images, affine(xx=share_x, yy=share_y, x=shift_x, y=shift_y), padding="border")


class TrivialAugment(Transform):
    """One operation a picture, of random kind and strength (Müller and Hutter, "TrivialAugment", ICCV 2021).

    Args:
        strength: greatest strength, as a share of the strongest setting, in (0, 1].
    """

    def __init__(self, strength: float = 1.0) -> None:
        share("data.augment.trivial.strength", strength, zero=False)
        self.strength = float(strength)

    @override
    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        operation = draws.integers(0, len(OPS))
        return apply_ops(images, operation, draws.uniform(1, 0.0, self.strength), draws.uniform(2) < 0.5)


class RandAugment(Transform):
    """``ops`` operations a picture, one after the other, of one strength (Cubuk et al., "RandAugment", NeurIPS 2020).

    Args:
        ops: number of operations.
        magnitude: strength, 0..10.
    """

    def __init__(self, ops: int = 2, magnitude: float = 9) -> None:
        if not (isinstance(ops, int) and 1 <= ops <= 16):
            raise UserError("data.augment.randaugment.ops", ops, "1..16")
        if not 0 <= magnitude <= 10:
            raise UserError("data.augment.randaugment.magnitude", magnitude, "0..10")
        self.ops, self.magnitude = ops, float(magnitude)

    @override
    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        strength = torch.full((len(images),), self.magnitude / 10, device=images.device)
        for turn in range(self.ops):
            operation = draws.integers(2 * turn, len(OPS))
            images = apply_ops(images, operation, strength, draws.uniform(2 * turn + 1) < 0.5)
        return images


TRANSFORMS: dict[str, type] = {
    "crop": Crop,
    "flip": Flip,
    "cutout": Cutout,
    "random_resized_crop": RandomResizedCrop,
    "trivial": TrivialAugment,
    "randaugment": RandAugment,
    "mixup": MixUp,
    "cutmix": CutMix,
}
"""Transforms that ``data.augment`` may name."""


class Augmentation:
    """A pipeline of transforms, and the ways of mixing rows that come after it.

    Args:
        spec: names (``[crop, flip]``), names with options (``[{crop: {padding: 4}}, flip]``, or one mapping), or None.
        shape: shape of one input: (C, H, W), or (F,) for tables, which can only be mixed.
        seed: seed of the random numbers.
        enumerate_views: count through the outcomes (``views="all"``) instead of hashing.
        white: the uint8 level that means 1.

    Raises:
        UserError: for an unknown name or option, or one that does not fit the inputs.
    """

    def __init__(
        self,
        spec: Any,
        shape: tuple[int, ...],
        seed: int = 0,
        enumerate_views: bool = False,
        white: float = 255.0,
    ) -> None:
        self.seed, self.white = seed, white
        self.enumerate_views = enumerate_views
        self.transforms: list[Transform] = []
        self.mixings: list[Mixing] = []
        names = []
        for name, options in _entries(spec):
            built = _build(name, options, shape)
            names.append(name + _text(options))
            (self.mixings if isinstance(built, Mixing) else self.transforms).append(built)
        self.text = " + ".join(names) or "none"
        self.finite = self._outcomes(names)

    def _outcomes(self, names: list[str]) -> int | None:
        """Count the distinct views: 1 without random transforms, None where there is no end of them."""
        counts = [t.finite for t in self.transforms]
        if self.enumerate_views:
            endless = [t for t in self.transforms if t.finite is None]
            if endless:
                named = next(n for n, kind in TRANSFORMS.items() if isinstance(endless[0], kind))
                finite = ", ".join(n for n, kind in TRANSFORMS.items() if issubclass(kind, Finite))
                raise UserError(
                    "data.views",
                    (
                        f"all; {named} in data.augment has no end of outcomes; accepted with it: a "
                        f"number of views; transforms that can be counted: {finite}"
                    ),
                )
        return None if None in counts else math.prod(c for c in counts if c is not None)

    def __call__(self, images: Tensor, example: Tensor, view: Tensor | int) -> Tensor:
        """Show examples under views.

        Args:
            images: (B, C, H, W), uint8 or float in [0, 1].
            example: (B,) int64: which example each is.
            view: (B,) int64, or one number for all.

        Returns:
            (B, C, H, W) float in [0, 1]; a new tensor unless they were float already and there is nothing to do.
        """
        if self.transforms and self.enumerate_views:
            left = view if isinstance(view, Tensor) else torch.full_like(example, view)
            for transform in self.transforms:
                assert isinstance(transform, Finite)
                images = transform.apply(images, left % transform.finite)
                left = left // transform.finite
        elif self.transforms:
            draws = Draws.of(self.seed, example, view)
            for position, transform in enumerate(self.transforms):
                if not transform.takes_bytes:
                    images = self.to_float(images)
                images = transform(images, draws.stream(position))
        return self.to_float(images)

    def to_float(self, images: Tensor) -> Tensor:
        """Convert uint8 levels to float in [0, 1]; other tensors stay as they are."""
        return images.float().div_(self.white) if images.dtype == torch.uint8 else images


def _entries(spec: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, options) of every transform that ``data.augment`` asks for."""
    if spec is None:
        return []
    if isinstance(spec, str):
        return [(spec, {})]
    if isinstance(spec, Mapping):
        return [(str(k), _options(k, v)) for k, v in spec.items() if v is not False]
    if isinstance(spec, Sequence):
        return [entry for part in spec for entry in _entries(part)]
    raise UserError("data.augment", f"{spec!r}", "a list of names, or of names with options")


def _options(name: Any, value: Any) -> dict[str, Any]:
    if value is None or value is True:
        return {}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    raise UserError(f"data.augment.{name}", f"{value!r}", "a mapping of options")


def _build(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> Any:
    if name not in TRANSFORMS:
        raise unknown("data.augment", name, TRANSFORMS, "transform")
    kind = TRANSFORMS[name]
    if len(shape) != 3 and kind is not MixUp:
        raise UserError("data.augment", f"{name} needs pictures (C, H, W), these inputs are {shape}", "mixup")
    wanted = inspect.signature(kind).parameters
    size = {"height": shape[-2], "width": shape[-1]} if "height" in wanted else {}
    for option in options:
        if option not in wanted or option in size:
            raise unknown(f"data.augment.{name}", option, [w for w in wanted if w not in size], "option")
    try:
        return kind(**size, **options)
    except TypeError:
        raise UserError(f"data.augment.{name}", f"{options} has a value of the wrong type") from None


def _text(options: dict[str, Any]) -> str:
    return "(" + ", ".join(f"{k}={v}" for k, v in sorted(options.items())) + ")" if options else ""
