"""The toy world: its scenes, their images and their captions.

A [`Scene`] is one shape in a place, or two or three identical shapes in a row or column, on a plain background. It can
be drawn ([`draw`]), described ([`caption`]), and parsed from its caption ([`parse`]). The rest of the toy is built on
these three functions.
"""

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from PIL import Image, ImageDraw


T = TypeVar("T")

SIZE = 64  # width and height of an image, in pixels

COLORS = {
    "red": (214, 40, 40),
    "green": (40, 158, 62),
    "blue": (40, 84, 214),
    "yellow": (244, 208, 40),
    "purple": (150, 50, 190),
    "cyan": (40, 196, 216),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (136, 136, 136), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (6.5, 7.5), "large": (10.5, 12.0)}  # half the width, in pixels
PLACES = {"left": (15, 32), "right": (49, 32), "top": (32, 15), "bottom": (32, 49), "center": (32, 32)}
LAYOUTS = ("row", "column")
NUMBERS = {"two": 2, "three": 3}
CROSS_ARM = 0.36  # half the width of a cross's arm, as a share of half its size


@dataclass(frozen=True)
class Scene:
    """
    The content of an image, as described by a caption.

    Attributes:
        number (`int`): Number of objects, 1 to 3. All of them look the same.
        color (`str`): A key of `COLORS`.
        shape (`str`): One of `SHAPES`.
        place (`str`): A key of `PLACES` for one object, one of `LAYOUTS` for several.
        background (`str`): A key of `BACKGROUNDS`.
        size (`str` or `None`): A key of `SIZES` for one object, `None` for several.
    """

    number: int
    color: str
    shape: str
    place: str
    background: str
    size: str | None = None


def caption(scene: Scene) -> str:
    """The caption of a scene: "a small red circle at the top on gray" or "two green crosses in a row on white"."""
    if scene.number == 1:
        objects = f"a {scene.size} {scene.color} {scene.shape} at the {scene.place}"
    else:
        word = {count: word for word, count in NUMBERS.items()}[scene.number]
        objects = f"{word} {scene.color} {_plural(scene.shape)} in a {scene.place}"
    return f"{objects} on {scene.background}"


def parse(text: str) -> Scene:
    """
    The scene that a caption describes: `parse(caption(scene)) == scene`.

    Raises:
        `ValueError`: If `text` is not a caption of the toy world.
    """
    if text not in _SCENES:
        raise ValueError(
            f"`text` must be a caption of the toy world, got {text!r}. Examples are 'a small red circle at the top on "
            "gray' and 'two green crosses in a row on white'."
        )
    return _SCENES[text]


def all_captions() -> list[str]:
    """All 1,008 captions of the toy world, in a fixed order."""
    return list(_SCENES)


def is_held_out(text: str) -> bool:
    """Whether a caption is in the held-out quarter, which is never used to train the base model or a policy."""
    return hashlib.sha256(text.encode()).digest()[0] % 4 == 0


def misdescribe(scene: Scene, probability: float, rng: random.Random) -> Scene:
    """
    The scene with random mistakes: color, shape, place, background, and size or number are each replaced by a random
    other value with the given probability. A single object stays single, and several objects stay several.

    Args:
        scene ([`Scene`]): The correct scene.
        probability (`float`): Probability of each replacement.
        rng (`random.Random`): Source of the randomness.
    """

    def slip(value: T, choices: Iterable[T]) -> T:
        if rng.random() >= probability:
            return value
        return rng.choice([choice for choice in choices if choice != value])

    wrong = replace(
        scene,
        color=slip(scene.color, COLORS),
        shape=slip(scene.shape, SHAPES),
        place=slip(scene.place, PLACES if scene.number == 1 else LAYOUTS),
        background=slip(scene.background, BACKGROUNDS),
    )
    if scene.number == 1:
        return replace(wrong, size=slip(scene.size, SIZES))
    return replace(wrong, number=slip(scene.number, NUMBERS.values()))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """
    Draw a scene as a 64x64 RGB image. Positions and sizes are random within the limits of the scene, objects never
    touch, and edges are antialiased.

    Args:
        scene ([`Scene`]): The scene to draw.
        rng (`random.Random`): Source of the randomness.
    """
    scale = 4
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for x, y, r in _arrange(scene, rng):
        for outline in _outlines(scene.shape, x * scale, y * scale, r * scale):
            draw_one = canvas.ellipse if scene.shape == "circle" else canvas.polygon
            draw_one(outline, fill=COLORS[scene.color])
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _arrange(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Center and half the size of each object, in pixels."""
    if scene.size is not None:
        x, y = PLACES[scene.place]
        return [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), rng.uniform(*SIZES[scene.size]))]
    along = {2: (19, 45), 3: (12, 32, 52)}[scene.number]
    half = {2: (7.5, 9.0), 3: (6.5, 7.5)}[scene.number]
    across = rng.uniform(27, 37)
    positions = [(a + rng.uniform(-1, 1), across + rng.uniform(-1, 1), rng.uniform(*half)) for a in along]
    return positions if scene.place == "row" else [(y, x, r) for x, y, r in positions]


def _outlines(shape: str, x: float, y: float, r: float) -> list[list[tuple[float, float]]]:
    a = CROSS_ARM * r
    if shape == "circle":
        return [[(x - r, y - r), (x + r, y + r)]]
    if shape == "square":
        return [[(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]]
    if shape == "triangle":
        return [[(x, y - r), (x + r, y + r), (x - r, y + r)]]
    upright = [(x - a, y - r), (x + a, y - r), (x + a, y + r), (x - a, y + r)]
    level = [(x - r, y - a), (x + r, y - a), (x + r, y + a), (x - r, y + a)]
    return [upright, level]


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _all_scenes() -> list[Scene]:
    single = []
    several = []
    for color, shape, background in product(COLORS, SHAPES, BACKGROUNDS):
        for place, size in product(PLACES, SIZES):
            single.append(Scene(1, color, shape, place, background, size))
        for layout, number in product(LAYOUTS, NUMBERS.values()):
            several.append(Scene(number, color, shape, layout, background))
    return single + several


_SCENES = {caption(scene): scene for scene in _all_scenes()}
