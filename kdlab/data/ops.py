"""The operations that TrivialAugment and RandAugment choose from, each on a batch with one strength a picture.

Pictures are float (B, C, H, W) in [0, 1]; levels are 0..255 where an operation counts them. Every operation treats
each picture by itself, bit for bit the same in any batch: sums are over integers, and no convolution or matrix product
is used, whose order of summation may follow the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def affine(
    like: Tensor | None = None,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> tuple[Tensor, ...]:
    """Return the coefficients of x' = xx·x + xy·y + x0, y' = yx·x + yy·y + y0 over [-1, 1]², each (B, 1, 1).

    ``like`` is any (B,) tensor, wanted only if all coefficients are plain numbers.
    """
    values = (xx, xy, x, yx, yy, y)
    like = next(v for v in (like, *values) if isinstance(v, Tensor))
    return tuple((v if isinstance(v, Tensor) else torch.full_like(like, v))[:, None, None] for v in values)


def sample(images: Tensor, matrix: tuple[Tensor, ...], padding: str = "zeros") -> Tensor:
    """Read images (B, C, H, W) at the places an :func:`affine` map says, bilinearly."""
    height, width = images.shape[-2:]
    xx, xy, x0, yx, yy, y0 = matrix
    x = ((torch.arange(width, device=images.device) * 2 + 1) / width - 1)[None, None, :]
    y = ((torch.arange(height, device=images.device) * 2 + 1) / height - 1)[None, :, None]
    grid = torch.stack([xx * x + xy * y + x0, yx * x + yy * y + y0], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Blend: factor 0 gives ``base``, 1 the images, 2 overshoots as far the other way."""
    factor = factor[:, None, None, None]
    return (base + (images - base) * factor).clamp(0, 1)


def _factor(strength: Tensor, down: Tensor) -> Tensor:
    """Return the factor 1 ± 0.9·strength."""
    return 1 + torch.where(down, -0.9, 0.9) * strength


def _grey(images: Tensor) -> Tensor:
    """Convert images to grey (B, 1, H, W): luma for three channels, else the mean."""
    if images.shape[1] == 3:
        red, green, blue = images.unbind(1)
        return (red * 0.299 + green * 0.587 + blue * 0.114)[:, None]
    return images if images.shape[1] == 1 else images.mean(1, keepdim=True)


def _levels(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.int64)


def identity(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


def brightness(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Change the brightness: blend with black."""
    return _blend(torch.zeros_like(images), images, _factor(strength, down))


def contrast(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Change the contrast: blend with the mean grey."""
    height, width = images.shape[-2:]
    mean = _levels(_grey(images)).sum((1, 2, 3)).float() / (255 * height * width)
    return _blend(mean[:, None, None, None].expand_as(images), images, _factor(strength, down))


def color(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Change the saturation: blend with the grey image."""
    return _blend(_grey(images).expand_as(images), images, _factor(strength, down))


def sharpness(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Change the sharpness: blend with a blurred image."""
    height, width = images.shape[-2:]
    blurred = images.clone()  # the border stays as it is
    total = images[..., 1:-1, 1:-1] * 4
    for dy in range(3):
        for dx in range(3):
            total = total + images[..., dy : height - 2 + dy, dx : width - 2 + dx]
    blurred[..., 1:-1, 1:-1] = total / 13
    return _blend(blurred, images, _factor(strength, down))


def posterize(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Keep 8 down to 2 bits of every level."""
    drop = (strength * 6).round().long()[:, None, None, None]
    return ((_levels(images) >> drop) << drop).float() / 255


def solarize(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Invert what is at least as bright as a threshold, from white down to black."""
    return torch.where(images >= (1 - strength)[:, None, None, None], 1 - images, images)


def autocontrast(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Stretch every channel to the full range; a flat one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp(min=1e-6), images).clamp(0, 1)


def equalize(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Level the histogram of every channel, by Pillow's formula."""
    flat = _levels(images).flatten(2)
    channel = torch.arange(flat.shape[0] * flat.shape[1], device=images.device).view(*flat.shape[:2], 1)
    # counted flat: scatter_add on several axes is refused where deterministic algorithms are asked for
    histogram = (flat + channel * 256).flatten().bincount(minlength=channel.numel() * 256).view(*flat.shape[:2], 256)
    brightest = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, flat), flat).reshape(images.shape).float() / 255


def _signed(value: Tensor, down: Tensor) -> Tensor:
    return torch.where(down, -value, value)


def rotate(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Rotate by up to 30 degrees."""
    angle = _signed(strength * math.radians(30), down)
    height, width = images.shape[-2:]
    cos, sin = angle.cos(), angle.sin()
    return sample(images, affine(xx=cos, xy=-sin * (height / width), yx=sin * (width / height), yy=cos))


def shear_x(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Shear along x by up to 0.3."""
    return sample(images, affine(xy=_signed(strength * 0.3, down)))


def shear_y(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Shear along y by up to 0.3."""
    return sample(images, affine(yx=_signed(strength * 0.3, down)))


def translate_x(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Shift along x by up to 0.3 of the width."""
    return sample(images, affine(x=_signed(strength * 0.6, down)))


def translate_y(images: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Shift along y by up to 0.3 of the height."""
    return sample(images, affine(y=_signed(strength * 0.6, down)))


OPS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    identity,
    brightness,
    contrast,
    color,
    sharpness,
    posterize,
    solarize,
    autocontrast,
    equalize,
    rotate,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def apply_ops(images: Tensor, operation: Tensor, strength: Tensor, down: Tensor) -> Tensor:
    """Apply to each picture the operation that is chosen for it.

    Rows are sorted by operation, so that each runs once, on its own rows only.

    Args:
        images: (B, C, H, W) float in [0, 1].
        operation: (B,) int64, index into :data:`OPS`.
        strength: (B,) float in [0, 1].
        down: (B,) bool: the direction, where an operation has two.

    Returns:
        (B, C, H, W)
    """
    order = operation.argsort()
    counts = operation.bincount(minlength=len(OPS)).tolist()
    sizes = [part for part in zip(OPS, order.split(counts), strict=True) if len(part[1])]
    changed = torch.empty_like(images)
    for change, rows in sizes:
        changed[rows] = change(images[rows], strength[rows], down[rows])
    return changed
