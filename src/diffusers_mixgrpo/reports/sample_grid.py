"""A grid of images with a caption under each."""

import os
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def save_sample_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    path: str | os.PathLike,
    columns: int = 8,
    tile_size: int = 160,
) -> None:
    """
    Draw images side by side and save them as one PNG. Its folder is created if needed.

    Args:
        images (sequence of `n` `PIL.Image.Image`): The images; they are scaled to the tiles.
        captions (sequence of `n` `str`): The text under each, wrapped to the width of a tile.
        path (`str` or `os.PathLike`): Where to save the grid.
        columns (`int`, defaults to 8): Images per row.
        tile_size (`int`, defaults to 160): Width of a tile in pixels.
    """
    font = ImageFont.load_default(size=11)
    lines = [textwrap.wrap(caption, width=tile_size // 6)[:4] for caption in captions]
    row_height = tile_size + 14 * max(map(len, lines)) + 10
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (tile_size + 8), rows * row_height), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(zip(images, lines, strict=True)):
        x = index % columns * (tile_size + 8) + 4
        y = index // columns * row_height + 4
        grid.paste(image.convert("RGB").resize((tile_size, tile_size), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + tile_size + 2), "\n".join(caption), fill="black", font=font, spacing=2)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    grid.save(path)
