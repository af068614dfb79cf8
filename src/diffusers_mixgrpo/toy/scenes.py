"""The toy world: what its pictures hold, how they are drawn and how they are described.

A [`Scene`] is one to three shapes on a plain background. It can be drawn ([`draw`]), put into words
([`caption`]) and read back from them ([`parse`]). Everything else in the toy follows from these three.
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
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
CROSS_ARM = 0.36  # half the width of a cross's arm, as a share of half its size


@dataclass(frozen=True)
class Scene:
    """
    What a caption asks for.

    Attributes:
        objects (`tuple[tuple[str, str], ...]`): one (colour, shape) for each object.
        background (`str`): a key of `BACKGROUNDS`.
        relation (`str` or `None`): where the first object is, seen from the second. Only for two objects.
    """

    objects: tuple[tuple[str, str], ...]
    background: str
    relation: str | None = None


def caption(scene: Scene) -> str:
    """The words for a scene, such as "a red circle left of a blue square on gray" or "two green crosses on white"."""
    colour, shape = scene.objects[0]
    if scene.relation is not None:
        other_colour, other_shape = scene.objects[1]
        what = f"a {colour} {shape} {scene.relation} a {other_colour} {other_shape}"
    elif len(scene.objects) == 1:
        what = f"a {colour} {shape}"
    else:
        number = {count: word for word, count in NUMBERS.items()}[len(scene.objects)]
        what = f"{number} {colour} {_plural(shape)}"
    return f"{what} on {scene.background}"


def parse(text: str) -> Scene:
    """
    Reads a caption back into the scene it describes: `parse(caption(scene)) == scene`.

    Raises:
        ValueError: if `text` is not a caption of the toy world.
    """
    try:
        what, background = text.split(" on ")
        words = what.split(" ")
        if background not in BACKGROUNDS:
            raise KeyError(background)
        if words[0] in NUMBERS:
            number, colour, plural = words
            shape = {_plural(shape): shape for shape in SHAPES}[plural]
            scene = Scene(((_known(colour, COLOURS), shape),) * NUMBERS[number], background)
        elif len(words) == 3:
            scene = Scene((_read_object(words),), background)
        else:
            relation = _known(" ".join(words[3:-3]), RELATIONS)
            scene = Scene((_read_object(words[:3]), _read_object(words[-3:])), background, relation)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"`text` is not a caption of the toy world: {text!r}. Such captions read 'a red circle on white', "
            "'two green crosses on gray' or 'a red circle left of a blue square on black'."
        ) from error
    return scene


def all_captions() -> list[str]:
    """Every caption of the toy world, in a fixed order: 6,840 of them."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    scenes = []
    for background in BACKGROUNDS:
        for thing in things:
            scenes += [Scene((thing,) * count, background) for count in (1, 2, 3)]
            scenes += [
                Scene((thing, other), background, relation)
                for other in things
                if other != thing
                for relation in RELATIONS
            ]
    return [caption(scene) for scene in scenes]


def is_held_out(text: str) -> bool:
    """Whether a caption belongs to the tenth that no training, of the base model or of a policy, ever sees."""
    return hashlib.sha256(text.encode()).digest()[0] % 10 == 0


def misdescribe(scene: Scene, probability: float, rng: random.Random) -> Scene:
    """
    The scene as a careless writer would put it down: each colour, shape, number, relation and background is
    independently replaced by a random other one with the given probability.
    """

    def slip(value, choices):
        return rng.choice([choice for choice in choices if choice != value]) if rng.random() < probability else value

    background = slip(scene.background, BACKGROUNDS)
    if scene.relation is None:
        colour, shape = scene.objects[0]
        thing = (slip(colour, COLOURS), slip(shape, SHAPES))
        return Scene((thing,) * slip(len(scene.objects), (1, 2, 3)), background)
    objects = tuple((slip(colour, COLOURS), slip(shape, SHAPES)) for colour, shape in scene.objects)
    wrong = replace(scene, objects=objects, background=background, relation=slip(scene.relation, RELATIONS))
    return wrong if objects[0] != objects[1] else scene


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """
    One picture of a scene, 64x64 RGB: positions and sizes are random within what the scene allows, objects never
    touch and the edges are smooth.
    """
    half = [rng.uniform(8.5, 10.5) for _ in scene.objects]
    centres = _place(scene, half, rng)
    scale = 4
    picture = Image.new("RGB", (SIZE * scale, SIZE * scale), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for (colour, shape), (x, y), r in zip(scene.objects, centres, half, strict=True):
        for outline in _outlines(shape, x * scale, y * scale, r * scale):
            draw_one = canvas.ellipse if shape == "circle" else canvas.polygon
            draw_one(outline, fill=COLOURS[colour])
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _outlines(shape: str, x: float, y: float, r: float) -> list[list[tuple[float, float]]]:
    a = CROSS_ARM * r
    box = [(x - r, y - r), (x + r, y + r)]
    if shape == "circle":
        return [box]
    if shape == "square":
        return [[(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]]
    if shape == "triangle":
        return [[(x, y - r), (x + r, y + r), (x - r, y + r)]]
    upright = [(x - a, y - r), (x + a, y - r), (x + a, y + r), (x - a, y + r)]
    level = [(x - r, y - a), (x + r, y - a), (x + r, y + a), (x - r, y + a)]
    return [upright, level]


def _place(scene: Scene, half: list[float], rng: random.Random) -> list[tuple[float, float]]:
    if len(half) == 1:
        return [(rng.uniform(24, 40), rng.uniform(24, 40))]
    if scene.relation is None:  # each in a quarter of its own
        quarters = rng.sample([(17, 17), (47, 17), (17, 47), (47, 47)], len(half))
        return [(x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)) for x, y in quarters]
    near, far, off = rng.uniform(14, 19), rng.uniform(45, 50), rng.uniform(26, 38)
    along = [near, far] if scene.relation in ("left of", "above") else [far, near]
    across = [off, off + rng.uniform(-4, 4)]
    horizontal = scene.relation in ("left of", "right of")
    return list(zip(along, across, strict=True) if horizontal else zip(across, along, strict=True))


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _known(word: str, choices) -> str:
    if word not in choices:
        raise KeyError(word)
    return word


def _read_object(words: list[str]) -> tuple[str, str]:
    article, colour, shape = words
    if article != "a":
        raise ValueError(article)
    return _known(colour, COLOURS), _known(shape, SHAPES)
