"""One decoder for every picture file: any depth, colour mode and orientation to 8-bit pixels. Imports no torch.

What a picture is read as:

- 16 bits a channel: scaled, 65535 becomes 255. (Pillow itself reads 16-bit colour as its upper 8 bits.) A camera's 12
  bits in a 16-bit file cannot be told from a dark picture; the log line names the highest value found.
- Floating point: values in [0, 1], 1 becomes 255; a picture with others is refused.
- Whole numbers of 32 bits, signed ones of 16 bits, and CIE Lab: refused, since no full scale or conversion is known.
- 1 bit, palette, CMYK, YCbCr, HSV: converted to grey or RGB.
- An alpha channel is left out, and the colours beneath it are read, as torchvision does.
- Of several frames or pages the first is read.
- EXIF orientation is applied.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlab.system.files import Unreadable, open_regular

FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "SUN",
    "TGA",
    "TIFF",
    "WEBP",
)
"""Raster formats, by Pillow's names, that it decodes without another program (as EPS and WMF would need)."""

MOST_PIXELS = 64 * 2**20
"""Largest picture that is decoded, in pixels: some bytes can announce more of them than there is memory."""

_USUAL = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")

_REMARKS = {
    "deep": "16 bits a channel, scaled to 8 (full scale, 65535, becomes 255)",
    "float": "values in floating point, of which 1 becomes 255",
    "alpha": "an alpha channel, which is left out (the colours beneath it are read)",
    "frames": "several frames or pages, of which the first is read",
}


@dataclass(frozen=True)
class Look:
    """Remarks on how a picture is read.

    Args:
        remarks: properties of the picture: ``deep`` (16 bits a channel), ``float``, ``alpha``, ``frames``.
        highest: the highest value of a ``deep`` picture, on the scale to 65535.
    """

    remarks: frozenset[str] = frozenset()
    highest: int = 0


@functools.cache
def _pillow() -> Any:
    from PIL import Image

    Image.init()
    # what it warns of is refused: the limit here is lower
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


@functools.cache
def endings() -> frozenset[str]:
    """Return the endings of files that are read as pictures, in small letters, of what this Pillow can decode."""
    return frozenset(ending for ending, name in _pillow().registered_extensions().items() if name in (*FORMATS, "MPO"))


def listed() -> str:
    """List the endings that are read, as a text for messages: the usual ones by name, the others by their formats."""
    formats = [name for name in FORMATS if name not in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")]
    return f"{', '.join(_USUAL)}, or of {', '.join(formats[:-1])} or {formats[-1]} files"


def decode(path: Path, height: int, width: int, channels: int = 3) -> tuple[np.ndarray, Look]:
    """Decode a picture file to pixels (C, height, width) uint8, with remarks on how it is read.

    The picture is scaled (bilinear) until it covers ``height`` and ``width``, and the middle is cut out.

    Args:
        path: the file; its content decides what it is, not its name.
        height: pixels, from 1 on.
        width: see ``height``.
        channels: 3 for RGB, 1 for grey.

    Raises:
        Unreadable: if it is no picture, is damaged, or its values have no scale that is known.
    """
    from PIL import ImageOps

    try:
        with open_picture(path) as image:
            scale, inverted, remarks, highest = _full_scale(image), _white_is_zero(image), _header_remarks(image), 0
            upright = ImageOps.exif_transpose(image)
            if "alpha" in remarks and not _transparent(upright):
                remarks -= {"alpha"}
            if scale is not None:
                upright, top = _scaled(upright, scale, inverted)
                highest = round(top * 65535) if "deep" in remarks else 0
            fitted = ImageOps.fit(
                upright.convert("RGB" if channels == 3 else "L"), (width, height), _pillow().Resampling.BILINEAR
            )
            pixels = np.array(fitted, dtype=np.uint8).reshape(height, width, channels)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), Look(frozenset(remarks), highest)


def look(path: Path) -> Look:
    """Return remarks from a picture's header alone; none if it cannot be opened, an error that decoding will raise."""
    try:
        with open_picture(path) as image:
            return Look(frozenset(_header_remarks(image)))
    except (OSError, Unreadable):
        return Look()


def summary(looks: Iterable[Look], which: str = "") -> list[str]:
    """Return lines on how pictures were read: the number of pictures with each remark.

    Args:
        looks: one for each picture.
        which: words after the number of pictures, such as ``looked at``.
    """
    all_ = list(looks)
    counts = Counter(remark for one in all_ for remark in one.remarks)
    lines = []
    for remark, text in _REMARKS.items():
        if counts[remark]:
            number = f"{counts[remark]} of {len(all_)} pictures{which and ' '}{which}"
            highest = max(one.highest for one in all_) if remark == "deep" else 0
            lines.append(f"{number} have {text}" + (f"; the highest value is {highest}" if highest else ""))
    return lines


@contextmanager
def open_picture(path: str | Path) -> Iterator[Any]:
    """Open a picture file with Pillow, without decoding it yet.

    Whatever decoding it inside of the context raises is raised as ``Unreadable``.

    Raises:
        OSError: if the file cannot be opened.
        Unreadable: if it is no regular file, no picture, damaged, or of more than ``MOST_PIXELS``.
    """
    from PIL import UnidentifiedImageError

    pillow, path = _pillow(), Path(path)
    # A TGA file has no signature: damaged files of other kinds would pass for one.
    named_tga = pillow.registered_extensions().get(path.suffix.lower()) == "TGA"
    formats = [name for name in FORMATS if name in pillow.OPEN and (name != "TGA" or named_tga)]
    with open_regular(path) as file:
        try:
            with pillow.open(file, formats=formats) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise _too_large(f"{width} x {height}")
                yield picture
        except Unreadable:
            raise
        except pillow.DecompressionBombError:
            raise _too_large("a picture") from None
        except UnidentifiedImageError:
            if not path.stat().st_size:
                raise Unreadable("the file is empty") from None
            raise Unreadable(f"damaged, or of no kind that is read; accepted: {', '.join(formats)}") from None
        except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
            raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None


def _too_large(what: str) -> Unreadable:
    return Unreadable(f"{what}, more than {MOST_PIXELS / 2**20:.0f} Mi pixels")


def _header_remarks(image: Any) -> set[str]:
    remarks = set()
    if image.mode.startswith("I"):
        remarks.add("deep")
    elif image.mode == "F":
        remarks.add("float")
    elif image.has_transparency_data:
        remarks.add("alpha")
    # the further pictures of an MPO file are previews of the same
    if getattr(image, "is_animated", False) and image.format != "MPO":
        remarks.add("frames")
    return remarks


def _transparent(image: Any) -> bool:
    """Return whether some pixel is not opaque."""
    return bool(image.convert("RGBA").getchannel("A").getextrema()[0] < 255)


def _full_scale(image: Any) -> float | None:
    """Return the value that means white in a picture of more than 8 bits a channel; None for 8 bits or fewer.

    Raises:
        Unreadable: if it cannot be known.
    """
    if image.mode == "LAB":
        raise Unreadable("CIE Lab colours; accepted: RGB or grey, so convert it")
    if image.mode == "F":
        return 1.0
    if not image.mode.startswith("I"):
        return None
    bits = image.tag_v2.get(258, 16) if image.format == "TIFF" else 16
    bits = max(bits) if isinstance(bits, tuple) else bits
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those two hold 16 bits at most
        kind = "16-bit signed" if bits == 16 else f"{bits}-bit"
        raise Unreadable(
            f"{kind} whole numbers, whose white is not known; accepted: 8 or 16 bits without sign, or floats in [0, 1]"
        )
    return float(2**bits - 1)


def _white_is_zero(image: Any) -> bool:
    """Return whether a deep picture has black as its highest value, which Pillow turns round in 8-bit ones only."""
    return image.format == "TIFF" and image.tag_v2.get(262) == 0


def _scaled(image: Any, full: float, inverted: bool) -> tuple[Any, float]:
    """Convert a picture of more than 8 bits a channel to 8-bit grey, with its highest value as a share of white."""
    values = np.asarray(image).astype(np.float64) / full
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # also of NaN
        raise Unreadable(f"values from {low * full:g} to {high * full:g}; accepted: 8 or 16 bits, or floats in [0, 1]")
    values = 1 - values if inverted else values
    return _pillow().fromarray(np.rint(values * 255).astype(np.uint8)), high
