"""JPEG compressibility: how small a picture's JPEG file is. A reward that needs no weights, to try a trainer with."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image


def jpeg_compressibility(
    prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
) -> list[float | None]:
    """
    Minus the size of each picture's JPEG file at quality 95, in kilobytes of 1000 bytes, as in DDPO
    ([arXiv:2305.13301](https://huggingface.co/papers/2305.13301)). Below 0: at 512x512 pixels, about -5 for a plain
    picture of one colour and -300 for noise.

    Sizes grow with the number of pixels and differ a little between releases of PIL and its JPEG library.

    Args:
        prompts (`list[str]`): Not looked at.
        images (`list[PIL.Image.Image]`): Of any mode and size.
        columns: Ignored.

    Returns:
        `list[float | None]`, one per image; `None` if it cannot be decoded.

    Example:

    ```python
    scores = jpeg_compressibility(["a cat"], [image])
    ```
    """
    return [_score(image) for image in images]


def _score(image: Image.Image | None) -> float | None:
    if image is None:
        return None
    file = io.BytesIO()
    try:
        image.convert("RGB").save(file, format="JPEG", quality=95)
    except (OSError, SyntaxError):  # PIL raises both for broken files
        return None
    return -file.tell() / 1000
