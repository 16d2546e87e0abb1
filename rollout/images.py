"""Image reference -> pixels: one place that opens files, refuses what could exhaust memory, and bounds the size."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import PIL.ImageOps

from rollout.types import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others reach readers that run programs, such as Ghostscript


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelLimits:
    """How large a picture may be, on disk and once decoded; resizing keeps the aspect ratio.

    The defaults show a model between 4 and about 1 280 image tokens of 28 x 28 pixels (Qwen2.5-VL's patches), and
    refuse files no honest photograph needs.

    >>> PixelLimits(max_pixels=512 * 512)
    """

    min_pixels: int = 56 * 56  # smaller pictures are enlarged
    max_pixels: int = 1280 * 28 * 28  # larger pictures are shrunk
    max_source_pixels: int = 64 * 1024 * 1024  # refused before decoding: width x height as the header states them
    max_bytes: int = 64 * 1024 * 1024  # refused before opening: size of the file
    max_aspect_ratio: float = 200.0  # refused: longer side over shorter; vision processors refuse it too

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels <= self.max_source_pixels:
            raise ValueError(
                f"pixel limits are min_pixels {self.min_pixels}, max_pixels {self.max_pixels}, max_source_pixels "
                f"{self.max_source_pixels}; expected 0 < min_pixels <= max_pixels <= max_source_pixels"
            )


def load(image: Image, limits: PixelLimits) -> PIL.Image.Image:
    """Decode `image`, upright and in RGB, with between `min_pixels` and `max_pixels` pixels.

    Raises:
        ValueError: the file is missing, no image, truncated or beyond `limits`; the message names the file.
    """
    try:
        return _decode(image.path, limits)
    except ValueError as error:
        raise ValueError(f"image {image.path}: {error}") from error


def problem(path: Path, limits: PixelLimits) -> str | None:
    """What is wrong with the image file at `path`, found by decoding it; None if `load` will accept it."""
    try:
        _decode(path, limits)
    except ValueError as error:
        return str(error)
    return None


def fit(picture: PIL.Image.Image, limits: PixelLimits) -> PIL.Image.Image:
    """Resize aspect-true into the limits, or next to them where whole pixels do not reach between the two."""
    width, height = picture.size
    pixels = width * height
    if limits.min_pixels <= pixels <= limits.max_pixels:
        return picture
    # Rounding away from the violated bound keeps the result inside it.
    shrink = pixels > limits.max_pixels
    scale = math.sqrt((limits.max_pixels if shrink else limits.min_pixels) / pixels)
    round_side = math.floor if shrink else math.ceil
    size = max(1, round_side(width * scale)), max(1, round_side(height * scale))
    return picture.resize(size, PIL.Image.Resampling.BICUBIC)


def _decode(path: Path, limits: PixelLimits) -> PIL.Image.Image:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ValueError(f"the file cannot be read ({error.strerror}); check the path") from error
    if not path.is_file():
        raise ValueError("it is no regular file; replace it by a picture")
    if num_bytes > limits.max_bytes:
        raise ValueError(f"the file has {num_bytes} bytes, more than max_bytes {limits.max_bytes}; compress it")
    with warnings.catch_warnings():
        # Pillow only warns beyond its own, fixed number of pixels; `max_source_pixels` is the one that decides.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            opened = PIL.Image.open(path, formats=FORMATS)  # reads the header only
        except Exception as error:  # Pillow's readers raise almost anything at a broken or hostile header
            raise ValueError(f"the file cannot be opened as a picture ({error}); replace it") from error
    with opened:
        _check_header(opened.size, limits)
        try:
            return fit(PIL.ImageOps.exif_transpose(opened).convert("RGB"), limits)
        except Exception as error:  # the same holds for a truncated or hostile body
            raise ValueError(f"the picture cannot be decoded ({error}); replace the file") from error


def _check_header(size: tuple[int, int], limits: PixelLimits) -> None:
    width, height = size
    if width * height > limits.max_source_pixels:
        raise ValueError(
            f"the picture is {width} x {height}, more pixels than max_source_pixels {limits.max_source_pixels}; "
            "shrink it"
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ValueError(
            f"the picture is {width} x {height}, beyond max_aspect_ratio {limits.max_aspect_ratio:g}; crop it"
        )
