"""Draws images in groups, with a text above each group and the scores below each image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..training.samples import Sample, Samples
from .fonts import Font, font_for, shorten, wrap


# Lengths are in pixels.
LARGEST = 384  # side of a square with the area of the largest images; larger ones are scaled down
SMALLEST = 256  # smaller images are enlarged by whole factors, up to about this
NARROWEST = 180  # so that scores fit below
WIDEST = 1680  # of a grid
MARGIN = 24
GAP = 8
TITLE = 26  # sizes of text
PROMPT = 18
SCORE = 16
LINE_SPACING = 1.3
MAX_PROMPT_LINES = 3

INK = "#1f2328"
GRAY = "#57606a"
# The two differ in lightness too, and each is named by a word.
MARKS = {"best": "#0550ae", "worst": "#bc4c00"}
FRAME = 5


@dataclass(frozen=True)
class Tile:
    """
    An image in a grid.

    Args:
        image (`PIL.Image.Image`): The image.
        scores (`list[tuple[str, str]]`): Names and values below it. A name that is too long is shortened; a value
            never is.
        mark (`str`, *optional*): A name in `MARKS` for a frame and a word.
    """

    image: Image.Image
    scores: list[tuple[str, str]]
    mark: str | None = None


@dataclass(frozen=True)
class Block:
    """Images of one prompt, whose text stands above them once."""

    prompt: str
    tiles: list[Tile]


def draw_samples(samples: Samples) -> Image.Image:
    """
    The images of the fixed prompts, with their scores, and the step in the title. The best and the worst are marked.
    An image that was edited stands before its results.
    """
    known = [sample.reward for sample in samples.fixed if sample.reward is not None]
    marks = _marks([sample.reward for sample in samples.fixed])
    scores = score_lines(samples.fixed)
    tiles = [Tile(s.image, lines, mark) for s, lines, mark in zip(samples.fixed, scores, marks, strict=True)]
    count = samples.images_per_prompt
    blocks = []
    for i in range(0, len(tiles), count):
        first = samples.fixed[i]
        edited = [] if first.condition is None else [Tile(first.condition, [("image to edit", "")])]
        blocks.append(Block(first.prompt, edited + tiles[i : i + count]))
    mean = f"mean reward {number(sum(known) / len(known))}" if known else "no image could be scored"
    return draw_grid(f"Step {samples.step} of {samples.max_steps}", mean, blocks)


def draw_grid(title: str, subtitle: str, blocks: Sequence[Block]) -> Image.Image:
    """
    Draw groups of images side by side and below each other.

    Args:
        title, subtitle (`str`): The text at the top, and a smaller one behind it.
        blocks (`Sequence[Block]`): The groups.
    """
    scaled = [[scale(tile.image) for tile in block.tiles] for block in blocks]
    cell = max([NARROWEST] + [image.width for images in scaled for image in images])
    most = max(len(block.tiles) for block in blocks)
    across = max(1, min(most, (WIDEST - 2 * MARGIN + GAP) // (cell + GAP)))  # images of a group in one row
    block_width = across * (cell + GAP) - GAP
    columns = max(1, (WIDEST - MARGIN) // (block_width + MARGIN))
    columns = math.ceil(len(blocks) / math.ceil(len(blocks) / columns))  # no row much emptier than the others
    width = max(MARGIN + columns * (block_width + MARGIN), NARROWEST * 2)
    drawn = []
    for start in range(0, len(blocks), columns):
        prompts = [_prompt_lines(i, blocks[i].prompt, block_width) for i in range(start, len(blocks))[:columns]]
        top = max(len(lines) for _, lines in prompts) * _height(PROMPT) + GAP  # so that the images are aligned
        for i, (font, lines) in enumerate(prompts, start):
            drawn.append(_draw_block(blocks[i], scaled[i], cell, across, top))
            _draw_lines(drawn[-1], font, lines)
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    top = 2 * MARGIN + _height(TITLE)
    grid = Image.new("RGB", (width, top + sum(max(block.height for block in row) + MARGIN for row in rows)), "white")
    _draw_title(ImageDraw.Draw(grid), title, subtitle, width)
    y = top
    for row in rows:
        for i, block in enumerate(row):
            grid.paste(block, (MARGIN + i * (block_width + MARGIN), y))
        y += max(block.height for block in row) + MARGIN
    return grid


def scale(image: Image.Image) -> Image.Image:
    """
    An image at the size of a tile, with its aspect ratio: small ones enlarged by a whole factor, so that each pixel
    is a square, and large ones scaled down.
    """
    image = image.convert("RGB")
    side = math.sqrt(image.width * image.height)
    if side < SMALLEST:
        factor = math.ceil(SMALLEST / side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if side > LARGEST:
        size = round(image.width * LARGEST / side), round(image.height * LARGEST / side)
        return image.resize((max(1, size[0]), max(1, size[1])), Image.Resampling.LANCZOS)
    return image


def score_lines(samples: Sequence[Sample]) -> list[list[tuple[str, str]]]:
    """For each image the names and values of its scores; the weighted reward comes first, if it is not one of them."""
    names = samples[0].rewards
    is_one_of_them = any(all(sample.rewards[name] == sample.reward for sample in samples) for name in names)
    lines = [[(readable(name), number(value)) for name, value in sample.rewards.items()] for sample in samples]
    if is_one_of_them:
        return lines
    return [[("reward", number(sample.reward)), *own] for sample, own in zip(samples, lines, strict=True)]


def readable(name: str) -> str:
    """A reward's name without the marks of code: `toy_reward` is "toy reward"."""
    return name.replace("_", " ").strip(" <>") or "reward"


def number(value: float | None) -> str:
    """A score with three digits after the point, or four in all if it is large, or that there is none."""
    if value is None or math.isnan(value):
        return "not scored"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _marks(rewards: Sequence[float | None]) -> list[str | None]:
    """A mark for the first image with the highest reward, and one for that with the lowest, if they differ."""
    marks: list[str | None] = [None] * len(rewards)
    known = [reward for reward in rewards if reward is not None]
    if known and max(known) > min(known):
        marks[rewards.index(max(known))] = "best"
        marks[rewards.index(min(known))] = "worst"
    return marks


def _height(size: int) -> int:
    return math.ceil(size * LINE_SPACING)


def _draw_title(draw: ImageDraw.ImageDraw, title: str, subtitle: str, width: int) -> None:
    font, _ = font_for(title, TITLE)
    small, _ = font_for(subtitle, PROMPT)
    baseline = MARGIN + TITLE
    title = shorten(title, font, width - 2 * MARGIN)
    draw.text((MARGIN, baseline), title, INK, font, anchor="ls")
    left = MARGIN + font.getlength(title) + MARGIN
    if left + small.getlength(subtitle) <= width - MARGIN:
        draw.text((left, baseline), subtitle, GRAY, small, anchor="ls")


def _prompt_lines(index: int, prompt: str, width: int) -> tuple[Font, list[str]]:
    """A prompt in lines of at most `width`, and their font; or its number, if there is no font for it."""
    font, is_readable = font_for(prompt, PROMPT)
    if not is_readable:
        prompt = f"Prompt {index + 1} (no font here has its characters)"
        font, _ = font_for(prompt, PROMPT)
    return font, wrap(prompt, font, width, MAX_PROMPT_LINES)


def _draw_lines(image: Image.Image, font: Font, lines: Sequence[str]) -> None:
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((0, i * _height(PROMPT)), line, INK, font)


def _draw_block(block: Block, images: Sequence[Image.Image], cell: int, across: int, top: int) -> Image.Image:
    """A group: its images in rows, with their scores, below `top` pixels for the prompt."""
    scores = max(len(tile.scores) for tile in block.tiles) * _height(SCORE)
    row_height = max(image.height for image in images) + 2 * GAP + scores
    rows = math.ceil(len(images) / across)
    drawn = Image.new("RGB", (across * (cell + GAP) - GAP, top + rows * row_height), "white")
    draw = ImageDraw.Draw(drawn)
    for i, (tile, image) in enumerate(zip(block.tiles, images, strict=True)):
        x = i % across * (cell + GAP)
        y = top + i // across * row_height
        drawn.paste(image, (x, y))
        _draw_scores(draw, tile, (x, y, x + image.width, y + image.height), x + cell)
    return drawn


def _draw_scores(draw: ImageDraw.ImageDraw, tile: Tile, box: tuple[int, int, int, int], right: int) -> None:
    """The scores below the image in `box`, its frame, and the word that says what the frame means."""
    left, _, _, bottom = box
    if tile.mark is not None:
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=MARKS[tile.mark], width=FRAME)
    for i, (name, value) in enumerate(tile.scores):
        font, _ = font_for(f"{name} {value}", SCORE)
        room = right - left
        y = bottom + GAP + i * _height(SCORE)
        if i == 0 and tile.mark is not None:
            word = tile.mark
            tag = font.getlength(word) + 2 * GAP
            draw.rounded_rectangle((right - tag, y - 2, right - 1, y + _height(SCORE) - 2), 5, MARKS[word])
            draw.text((right - tag / 2, y + _height(SCORE) / 2 - 2), word, "white", font, anchor="mm")
            room -= math.ceil(tag) + GAP
        name = shorten(name, font, room - font.getlength(f" {value}"))
        draw.text((left, y), f"{name} {value}", INK if i == 0 else GRAY, font)
