"""A grid of pictures with a line of text under each."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def save_sample_grid(
    images: Sequence[Any], captions: Sequence[str], path: str | os.PathLike, columns: int = 8, tile_size: int = 160
) -> None:
    """
    Draw pictures side by side and save them as one PNG; its folder is made if need be.

    Args:
        images (sequence of `n` `PIL.Image.Image`): The pictures; they are scaled to the tiles.
        captions (sequence of `n` `str`): What to write under each, wrapped to the tile's width.
        path (`str` or `os.PathLike`): Where to save the grid.
        columns (`int`, defaults to 8): Pictures per row.
        tile_size (`int`, defaults to 160): Width of a picture in pixels.
    """
    font = ImageFont.load_default(size=11)
    lines = [textwrap.wrap(caption, width=tile_size // 6)[:4] for caption in captions]
    row_height = tile_size + 14 * max(map(len, lines)) + 10
    columns = min(columns, len(images))
    grid = Image.new("RGB", (columns * (tile_size + 8), -(-len(images) // columns) * row_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(zip(images, lines, strict=True)):
        x, y = index % columns * (tile_size + 8) + 4, index // columns * row_height + 4
        grid.paste(image.convert("RGB").resize((tile_size, tile_size), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + tile_size + 2), "\n".join(caption), fill="black", font=font, spacing=2)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    grid.save(path)
