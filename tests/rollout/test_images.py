"""Pictures are decoded within limits, and refused by their header before any pixel is."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.images import PixelLimits, fit, load, problem
from rollout.types import Image

LIMITS = PixelLimits(min_pixels=1000, max_pixels=4000, max_source_pixels=100_000, max_bytes=10_000)


def saved(path: Path, size: tuple[int, int], mode: str = "RGB", **options: object) -> Path:
    PIL.Image.new(mode, size, "red").save(path, **options)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels: what a decompression bomb looks like."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    )


def test_a_picture_within_the_limits_keeps_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    original = PIL.Image.effect_noise((50, 40), 80).convert("RGB")
    original.save(path)
    assert load(Image(path=path), LIMITS).tobytes() == original.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    picture = PIL.Image.new("RGB", (50, 40), "white").convert(mode)
    picture.save(tmp_path / f"a.{suffix}")
    loaded = load(Image(path=tmp_path / f"a.{suffix}"), LIMITS)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((3, 3)) == (255, 255, 255)


def test_a_photograph_taken_sideways_stands_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    path = saved(tmp_path / "a.jpg", (60, 40), exif=exif)
    assert load(Image(path=path), LIMITS).size == (40, 60)


@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_resizing_reaches_the_limits_and_keeps_the_aspect(width: int, height: int) -> None:
    resized = fit(PIL.Image.new("L", (width, height)), LIMITS)
    pixels = resized.width * resized.height
    assert LIMITS.min_pixels <= pixels <= LIMITS.max_pixels or min(resized.size) < 40  # thin: a pixel more is a lot
    target = min(max(width * height, LIMITS.min_pixels), LIMITS.max_pixels)
    scale = (target / (width * height)) ** 0.5
    assert abs(resized.width - width * scale) < 1
    assert abs(resized.height - height * scale) < 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "the file cannot be read (No such file or directory); check the path", id="missing"),
        pytest.param(b"", "cannot be opened as a picture", id="empty"),
        pytest.param(b"not a picture", "cannot be opened as a picture", id="text"),
        pytest.param(bytes(20_000), "20000 bytes, more than max_bytes 10000", id="large file"),
        pytest.param(png_header(60, 60), "cannot be decoded", id="truncated"),
        pytest.param(png_header(1000, 101), "1000 x 101, more pixels than max_source_pixels 100000", id="large"),
        pytest.param(png_header(60_000, 60_000), "cannot be opened as a picture (Image size", id="bomb"),
        pytest.param(png_header(2010, 10), "2010 x 10, beyond max_aspect_ratio 200; crop it", id="strip"),
    ],
)
def test_what_is_refused_and_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    found = problem(path, LIMITS)
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match=r"a\.png: ") as raised:
        load(Image(path=path), LIMITS)
    assert reason in str(raised.value)


def test_a_good_picture_has_no_problem(tmp_path: Path) -> None:
    assert problem(saved(tmp_path / "a.png", (60, 40)), LIMITS) is None


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 < min_pixels <= max_pixels <= max_source_pixels"):
        PixelLimits(min_pixels=5000, max_pixels=4000)
