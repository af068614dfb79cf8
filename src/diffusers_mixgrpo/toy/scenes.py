"""The toy world: what its pictures hold, how they are drawn and how they are described.

A [`Scene`] is one shape in a place, or two or three alike in a row or a column, on a plain background. It can be drawn
([`draw`]), put into words ([`caption`]) and read back from them ([`parse`]). Everything else in the toy follows from
these three.
"""

import hashlib
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw


SIZE = 64  # pixels, width and height of a picture

COLOURS = {
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
    What a caption asks for.

    Attributes:
        number (`int`): how many objects, 1 to 3. They are all alike.
        colour (`str`): a key of `COLOURS`.
        shape (`str`): one of `SHAPES`.
        place (`str`): a key of `PLACES` for one object, one of `LAYOUTS` for several.
        background (`str`): a key of `BACKGROUNDS`.
        size (`str` or `None`): a key of `SIZES` for one object, `None` for several.
    """

    number: int
    colour: str
    shape: str
    place: str
    background: str
    size: str | None = None


def caption(scene: Scene) -> str:
    """The words for a scene: "a small red circle at the top on gray" or "two green crosses in a row on white"."""
    if scene.number == 1:
        what = f"a {scene.size} {scene.colour} {scene.shape} at the {scene.place}"
    else:
        word = {count: word for word, count in NUMBERS.items()}[scene.number]
        what = f"{word} {scene.colour} {_plural(scene.shape)} in a {scene.place}"
    return f"{what} on {scene.background}"


def parse(text: str) -> Scene:
    """
    Reads a caption back into the scene it describes: `parse(caption(scene)) == scene`.

    Raises:
        ValueError: if `text` is not a caption of the toy world.
    """
    if text not in _SCENES:
        raise ValueError(
            f"`text` is not a caption of the toy world: {text!r}. Such captions read 'a small red circle at the top "
            "on gray' or 'two green crosses in a row on white'."
        )
    return _SCENES[text]


def all_captions() -> list[str]:
    """Every caption of the toy world, in a fixed order: 1,008 of them."""
    return list(_SCENES)


def is_held_out(text: str) -> bool:
    """Whether a caption belongs to the quarter that no training, of the base model or of a policy, ever sees."""
    return hashlib.sha256(text.encode()).digest()[0] % 4 == 0


def misdescribe(scene: Scene, probability: float, rng: random.Random) -> Scene:
    """
    The scene as a careless writer would put it down: each colour, shape, size, number, place and background is
    independently replaced by a random other one with the given probability. One object stays one, several several.
    """

    def slip(value, choices):
        return rng.choice([choice for choice in choices if choice != value]) if rng.random() < probability else value

    wrong = replace(
        scene,
        colour=slip(scene.colour, COLOURS),
        shape=slip(scene.shape, SHAPES),
        place=slip(scene.place, PLACES if scene.number == 1 else LAYOUTS),
        background=slip(scene.background, BACKGROUNDS),
    )
    if scene.number == 1:
        return replace(wrong, size=slip(scene.size, SIZES))
    return replace(wrong, number=slip(scene.number, NUMBERS.values()))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """
    One picture of a scene, 64x64 RGB: positions and sizes are random within what the scene allows, objects never
    touch and the edges are smooth.
    """
    scale = 4
    picture = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for x, y, r in _arrange(scene, rng):
        for outline in _outlines(scene.shape, x * scale, y * scale, r * scale):
            draw_one = canvas.ellipse if scene.shape == "circle" else canvas.polygon
            draw_one(outline, fill=COLOURS[scene.colour])
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _arrange(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and half the size of each object, in pixels."""
    if scene.size is not None:
        x, y = PLACES[scene.place]
        return [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), rng.uniform(*SIZES[scene.size]))]
    along, half = {2: ((19, 45), (7.5, 9.0)), 3: ((12, 32, 52), (6.5, 7.5))}[scene.number]
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
    looks = [(colour, shape, ground) for colour in COLOURS for shape in SHAPES for ground in BACKGROUNDS]
    single = [Scene(1, c, s, place, ground, size) for c, s, ground in looks for place in PLACES for size in SIZES]
    several = [
        Scene(n, c, s, layout, ground) for c, s, ground in looks for layout in LAYOUTS for n in NUMBERS.values()
    ]
    return single + several


_SCENES = {caption(scene): scene for scene in _all_scenes()}
