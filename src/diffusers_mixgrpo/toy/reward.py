"""The toy's verifiable reward: plain image analysis, no model.

A picture is taken apart into connected blobs that differ from its background. Each is measured: its colour, how well
it fills the outline of each shape, its centre, its size. These are then held against the caption. Scores lie in
[0, 1]; a rightly drawn picture has 1, and nothing that is drawn too much ever raises a score.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from PIL import Image
from scipy import ndimage

from .scenes import BACKGROUNDS, COLOURS, CROSS_ARM, PLACES, SHAPES, SIZE, SIZES, Scene, parse


MIN_AREA = 12  # pixels; smaller blobs are specks, not objects
_PALETTE = np.array([*BACKGROUNDS.values(), *COLOURS.values()], dtype=np.float32)
_NAMES = [*BACKGROUNDS, *COLOURS]


@dataclass(frozen=True)
class Blob:
    """
    One object found in a picture.

    Attributes:
        colour (`dict[str, float]`): for each colour, the share of the inner pixels that are nearest to it.
        shape (`dict[str, float]`): for each shape, the overlap (intersection over union) with the shape drawn into
            the blob's bounding box.
        x, y (`float`): the middle of the bounding box, in pixels.
        width, height (`int`): of the bounding box, in pixels.
    """

    colour: dict[str, float]
    shape: dict[str, float]
    x: float
    y: float
    width: int
    height: int


@dataclass(frozen=True)
class Judgement:
    """
    How a picture does against its caption.

    Attributes:
        score (`float`): the graded reward, in [0, 1].
        right (`bool`): the stricter judgement: everything asked for is there beyond doubt, and nothing else.
        drawn, wanted (`int`): how many objects the picture shows and how many the caption asks for.
    """

    score: float
    right: bool
    drawn: int
    wanted: int


def toy_reward(prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
    """
    Graded score of each picture against its caption: the mean match of colour and shape, times the smaller over the
    larger of the numbers of objects wanted and drawn, and 0.6 times for each of a wrong place, size and background.

    Args:
        prompts (`list[str]`): captions of the toy world, one for each image.
        images (`list[PIL.Image.Image]`): 64x64 RGB pictures.

    Returns:
        `list[float]`: one score in [0, 1] for each image.
    """
    return [judge(prompt, image).score for prompt, image in zip(prompts, images, strict=True)]


def wholly_right(prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
    """1 for each picture that is right beyond doubt and 0 for the others: the share of them is what a user sees."""
    return [float(judge(prompt, image).right) for prompt, image in zip(prompts, images, strict=True)]


def extra_objects(prompts: list[str], images: list[Image.Image], **columns) -> list[float]:
    """How many objects more than asked for each picture shows; negative if some are missing."""
    verdicts = [judge(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    return [float(verdict.drawn - verdict.wanted) for verdict in verdicts]


def judge(prompt: str, image: Image.Image) -> Judgement:
    """
    Takes a picture apart and holds it against its caption.

    Raises:
        ValueError: if `prompt` is not a caption of the toy world.
    """
    return _judge(prompt, image.convert("RGB").resize((SIZE, SIZE)).tobytes())


@lru_cache(maxsize=1024)  # several of the functions above often ask for the same pictures
def _judge(prompt: str, picture: bytes) -> Judgement:
    scene = parse(prompt)
    pixels = np.frombuffer(picture, dtype=np.uint8).reshape(SIZE, SIZE, 3).astype(np.float32)
    # |pixel - colour|^2 for all colours, less |pixel|^2, which is the same for all
    nearest = (np.square(_PALETTE).sum(-1) - 2 * pixels @ _PALETTE.T).argmin(-1)
    blobs, empty, specks = find_blobs(pixels, nearest)

    ground = (nearest == _NAMES.index(scene.background))[empty].mean() if empty.any() else 0.0
    ground = _ramp(float(ground), 0.5, 0.9)
    score = _match(scene, blobs) * _factor(ground)
    right = score > 0.999 and specks == 0 and all(max(blob.shape.values()) > 0.82 for blob in blobs)
    return Judgement(score=score, right=right, drawn=len(blobs), wanted=scene.number)


def find_blobs(pixels: np.ndarray, nearest: np.ndarray) -> tuple[list[Blob], np.ndarray, int]:
    """
    Finds the objects of a picture.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): RGB in [0, 255].
        nearest (`np.ndarray` of shape `(height, width)`): the palette's entry nearest to each pixel.

    Returns:
        The blobs; a mask of the empty pixels, of shape `(height, width)`; and the number of specks.
    """
    # 1. The background is the most common of the three background colours; what is far from it is an object.
    counts = np.bincount(nearest.ravel(), minlength=len(_NAMES))[: len(BACKGROUNDS)]
    ground = _PALETTE[int(counts.argmax())]
    filled = np.sqrt(np.square(pixels - ground).sum(-1)) > 75.0

    # 2. Objects are connected, and large enough to be seen.
    labels, count = ndimage.label(filled)
    blobs, specks = [], 0
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() < MIN_AREA:
            specks += 1
            continue
        blobs.append(_measure(mask, nearest[box], box))
    return blobs, ~filled, specks


def _measure(mask: np.ndarray, nearest: np.ndarray, box: tuple[slice, slice]) -> Blob:
    inner = ndimage.binary_erosion(mask)  # the rim is a mixture of two colours
    inside = nearest[inner if inner.any() else mask]
    shares = np.bincount(inside, minlength=len(_NAMES)) / len(inside)
    height, width = mask.shape
    shape = {name: _overlap(mask, outline) for name, outline in _outlines(height, width).items()}
    return Blob(
        colour={name: float(shares[_NAMES.index(name)]) for name in COLOURS},
        shape=shape,
        x=box[1].start + width / 2,
        y=box[0].start + height / 2,
        width=width,
        height=height,
    )


def _outlines(height: int, width: int) -> dict[str, np.ndarray]:
    v, u = np.mgrid[0:height, 0:width]
    u = np.abs((u + 0.5) / width * 2 - 1)
    v = (v + 0.5) / height * 2 - 1
    masks = (
        u**2 + v**2 <= 1,
        np.ones_like(u, dtype=bool),
        u <= (v + 1) / 2,
        (u <= CROSS_ARM) | (np.abs(v) <= CROSS_ARM),
    )
    return dict(zip(SHAPES, masks, strict=True))


def _overlap(mask: np.ndarray, outline: np.ndarray) -> float:
    return float((mask & outline).sum() / (mask | outline).sum())


def _ramp(value: float, low: float, high: float) -> float:
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _factor(share: float) -> float:
    return 0.6 + 0.4 * share


def _match(scene: Scene, blobs: list[Blob]) -> float:
    """
    How well the blobs are the wanted objects in their wanted place and size, in [0, 1].

    With more blobs than wanted, the *worst* choice of as many as wanted counts, so that no object that is drawn on
    top, whatever it looks like, can raise the score.
    """
    wanted, drawn = scene.number, len(blobs)
    if drawn == 0 or drawn > 8:  # nothing, or a picture in pieces
        return 0.0
    chosen = combinations(blobs, min(wanted, drawn))
    return min(_match_all(scene, some) for some in chosen) * min(wanted, drawn) / max(wanted, drawn)


def _match_all(scene: Scene, chosen: tuple[Blob, ...]) -> float:
    looks = sum(_looks(scene, blob) for blob in chosen) / len(chosen)
    if scene.size is not None:
        return looks * _factor(_in_place(scene.place, chosen[0])) * _factor(_sized(scene.size, chosen[0]))
    return looks * _factor(_in_line(scene.place, chosen))


def _looks(scene: Scene, blob: Blob) -> float:
    """Half for the colour, half for the shape; a blob that is no clear shape is worth less."""
    best = max(blob.shape, key=lambda name: blob.shape[name])
    clear = _ramp(blob.shape[best], 0.6, 0.75)
    clear *= _ramp(min(blob.width, blob.height) / max(blob.width, blob.height), 0.5, 0.75)
    clear *= _ramp(min(blob.width, blob.height), 5, 9) * _ramp(-max(blob.width, blob.height), -36, -28)
    return clear * (0.5 * _ramp(blob.colour[scene.colour], 0.4, 0.8) + 0.5 * (best == scene.shape))


def _in_place(place: str, blob: Blob) -> float:
    """Whether this is the nearest of all places, graded by how much nearer it is than the next."""
    distance = {name: float(np.hypot(blob.x - x, blob.y - y)) for name, (x, y) in PLACES.items()}
    others = min(value for name, value in distance.items() if name != place)
    return _ramp(others - distance[place], 0.0, 5.0)


def _sized(size: str, blob: Blob) -> float:
    middle = sum(sum(half) for half in SIZES.values()) / 2  # between small and large, in pixels
    width = (blob.width + blob.height) / 2
    return _ramp(width - middle if size == "large" else middle - width, 0.0, 1.5)


def _in_line(layout: str, chosen: tuple[Blob, ...]) -> float:
    across = max(blob.x for blob in chosen) - min(blob.x for blob in chosen)
    down = max(blob.y for blob in chosen) - min(blob.y for blob in chosen)
    return _ramp(across - down if layout == "row" else down - across, 0.0, 10.0)
