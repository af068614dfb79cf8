"""[`embed`]: an image file as a data URI of a bounded size, for a page that needs no other file."""

import base64
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


FORMATS = ("WEBP", "PNG", "JPEG")
QUALITIES = (85, 70, 50, 30)
SMALL = 128
"""Images up to this size in pixels are kept exactly, and shown without smoothing."""


@dataclass(frozen=True)
class Size:
    """
    How large an embedded image may be.

    Args:
        pixels (`int`): The longer side.
        kilobytes (`int`): The encoded file, before base64 makes it a third larger.
    """

    pixels: int
    kilobytes: int


@dataclass(frozen=True)
class EmbeddedImage:
    """A data URI, the size in pixels, and whether pixels should be shown as squares."""

    uri: str
    width: int
    height: int
    is_small: bool


def embed(path: Path, limit: Size) -> EmbeddedImage | None:
    """
    Encode an image anew, so that it fits `limit`.

    Returns:
        [`EmbeddedImage`], or `None` if the file is missing or is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    is_small = max(image.size) <= SMALL
    image.thumbnail((limit.pixels, limit.pixels), Image.Resampling.LANCZOS)
    image, data = _encode(image, limit.kilobytes * 1000, is_small)
    return EmbeddedImage(f"data:image/webp;base64,{base64.b64encode(data).decode()}", *image.size, is_small)


def _encode(image: Image.Image, limit: int, is_small: bool) -> tuple[Image.Image, bytes]:
    """The image as WebP in at most `limit` bytes: exactly if it is small, then worse and smaller until it fits."""
    if is_small and len(data := _webp(image, lossless=True)) <= limit:
        return image, data
    while True:
        for quality in QUALITIES:
            data = _webp(image, quality=quality)
            if len(data) <= limit or max(image.size) == 1:
                return image, data
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)


def _webp(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()
