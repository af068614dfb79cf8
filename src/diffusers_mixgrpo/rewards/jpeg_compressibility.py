"""JPEG compressibility: how small an image's JPEG file is. It needs no weights, which is convenient for testing."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image


def jpeg_compressibility(
    prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
) -> list[float | None]:
    """
    Negative size of each image's JPEG file at quality 95, in kilobytes (1000 bytes), as in DDPO
    ([arXiv:2305.13301](https://huggingface.co/papers/2305.13301)). Always below 0: at 512x512 pixels, about -5 for an
    image of a single color and -300 for noise.

    Sizes grow with the number of pixels and differ slightly between versions of PIL and its JPEG library.

    Args:
        prompts (`list[str]`): Ignored.
        images (`list[PIL.Image.Image]`): Images of any mode and size.
        columns: Ignored.

    Returns:
        `list[float | None]`: one score per image, `None` if the image cannot be decoded.

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
