"""The toy's verifiable reward: classical image analysis without a model.

An image is segmented into connected blobs that differ from its background. The color, shape, center and size of each
blob are measured and compared with the caption. Scores are in [0, 1]: a correct image scores 1, and extra objects
never increase a score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from .scenes import BACKGROUNDS, COLORS, CROSS_ARM, PLACES, SHAPES, SIZE, SIZES, Scene, parse


MIN_AREA = 12  # in pixels; smaller blobs are specks, not objects
_PALETTE = np.array([*BACKGROUNDS.values(), *COLORS.values()], dtype=np.float32)
_NAMES = [*BACKGROUNDS, *COLORS]


@dataclass(frozen=True)
class Blob:
    """
    One object found in an image.

    Attributes:
        color (`dict[str, float]`): For each color, the share of the inner pixels that are nearest to it.
        shape (`dict[str, float]`): For each shape, the intersection over union with the shape drawn into the blob's
            bounding box.
        x, y (`float`): Center of the bounding box, in pixels.
        width, height (`int`): Size of the bounding box, in pixels.
    """

    color: dict[str, float]
    shape: dict[str, float]
    x: float
    y: float
    width: int
    height: int


@dataclass(frozen=True)
class Judgment:
    """
    The result of comparing an image with its caption.

    Attributes:
        score (`float`): The graded reward, in [0, 1].
        right (`bool`): The strict criterion: the image clearly shows everything in the caption, and nothing else.
        drawn, wanted (`int`): Number of objects in the image and in the caption.
    """

    score: float
    right: bool
    drawn: int
    wanted: int


def toy_reward(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """
    Graded score of each image: the mean match of color and shape, times the ratio of the smaller to the larger of the
    wanted and drawn numbers of objects, times 0.6 for each of a wrong place, size and background.

    Args:
        prompts (`list[str]`): Captions of the toy world, one per image.
        images (`list[PIL.Image.Image]`): 64x64 RGB images.
        columns: Ignored.

    Returns:
        `list[float]`: One score in [0, 1] per image.
    """
    return [judge(prompt, image).score for prompt, image in zip(prompts, images, strict=True)]


def wholly_right(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """1 for each image that is clearly correct and 0 for the others, so that the mean is the share of such images."""
    return [float(judge(prompt, image).right) for prompt, image in zip(prompts, images, strict=True)]


def extra_objects(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> list[float]:
    """The number of extra objects in each image; negative if objects are missing."""
    verdicts = [judge(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
    return [float(verdict.drawn - verdict.wanted) for verdict in verdicts]


def judge(prompt: str, image: Image.Image) -> Judgment:
    """
    Compare an image with its caption.

    Raises:
        `ValueError`: If `prompt` is not a caption of the toy world.
    """
    return _judge(prompt, image.convert("RGB").resize((SIZE, SIZE)).tobytes())


@lru_cache(maxsize=1024)  # the rewards above are often used together on the same images
def _judge(prompt: str, image: bytes) -> Judgment:
    scene = parse(prompt)
    pixels = np.frombuffer(image, dtype=np.uint8).reshape(SIZE, SIZE, 3).astype(np.float32)
    # |pixel - color|^2 for all colors, without the term |pixel|^2 that is the same for all of them.
    nearest = (np.square(_PALETTE).sum(-1) - 2 * pixels @ _PALETTE.T).argmin(-1)
    blobs, empty, specks = find_blobs(pixels, nearest)

    share = float((nearest == _NAMES.index(scene.background))[empty].mean()) if empty.any() else 0.0
    score = _match(scene, blobs) * _factor(_ramp(share, 0.5, 0.9))
    clear = all(max(blob.shape.values()) > 0.82 for blob in blobs)
    right = score > 0.999 and specks == 0 and clear
    return Judgment(score=score, right=right, drawn=len(blobs), wanted=scene.number)


def find_blobs(pixels: np.ndarray, nearest: np.ndarray) -> tuple[list[Blob], np.ndarray, int]:
    """
    Find the objects of an image.

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`): RGB values in [0, 255].
        nearest (`np.ndarray` of shape `(height, width)`): Index of the palette color nearest to each pixel.

    Returns:
        `tuple`: The blobs, a mask of the empty pixels of shape `(height, width)`, and the number of specks.
    """

    # 1. The background is the most common of the three background colors. Pixels far from it belong to objects.
    counts = np.bincount(nearest.ravel(), minlength=len(_NAMES))[: len(BACKGROUNDS)]
    ground = _PALETTE[int(counts.argmax())]
    filled = np.sqrt(np.square(pixels - ground).sum(-1)) > 75.0

    # 2. Objects are connected components above a minimum area.
    labels, _ = ndimage.label(filled)
    blobs = []
    specks = 0
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() < MIN_AREA:
            specks += 1
            continue
        blobs.append(_measure(mask, nearest[box], box))
    return blobs, ~filled, specks


def _measure(mask: np.ndarray, nearest: np.ndarray, box: tuple[slice, slice]) -> Blob:
    inner = ndimage.binary_erosion(mask)  # without the rim, which mixes two colors
    inside = nearest[inner if inner.any() else mask]
    shares = np.bincount(inside, minlength=len(_NAMES)) / len(inside)
    height, width = mask.shape
    shape = {name: _overlap(mask, outline) for name, outline in _outlines(height, width).items()}
    return Blob(
        color={name: float(shares[_NAMES.index(name)]) for name in COLORS},
        shape=shape,
        x=box[1].start + width / 2,
        y=box[0].start + height / 2,
        width=width,
        height=height,
    )


def _outlines(height: int, width: int) -> dict[str, np.ndarray]:
    """A mask of each shape, drawn into a box of this size."""
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
    How well the blobs match the wanted objects in look, place and size, in [0, 1].

    With more blobs than wanted objects, the *worst* selection of the wanted number counts. An extra object can
    therefore never increase the score, whatever it looks like.
    """
    wanted = scene.number
    drawn = len(blobs)
    if drawn == 0 or drawn > 8:  # an empty or a fragmented image
        return 0.0
    selections = combinations(blobs, min(wanted, drawn))
    worst = min(_match_all(scene, chosen) for chosen in selections)
    return worst * min(wanted, drawn) / max(wanted, drawn)


def _match_all(scene: Scene, chosen: tuple[Blob, ...]) -> float:
    looks = sum(_looks(scene, blob) for blob in chosen) / len(chosen)
    if scene.size is not None:
        return looks * _factor(_in_place(scene.place, chosen[0])) * _factor(_sized(scene.size, chosen[0]))
    return looks * _factor(_in_line(scene.place, chosen))


def _looks(scene: Scene, blob: Blob) -> float:
    """Half for the color and half for the shape, reduced if the blob has no clear shape."""
    best = max(blob.shape, key=lambda name: blob.shape[name])
    clear = _ramp(blob.shape[best], 0.6, 0.75)
    clear *= _ramp(min(blob.width, blob.height) / max(blob.width, blob.height), 0.5, 0.75)
    clear *= _ramp(min(blob.width, blob.height), 5, 9) * _ramp(-max(blob.width, blob.height), -36, -28)
    return clear * (0.5 * _ramp(blob.color[scene.color], 0.4, 0.8) + 0.5 * (best == scene.shape))


def _in_place(place: str, blob: Blob) -> float:
    """Whether `place` is the nearest place, graded by how much nearer it is than the next one."""
    distance = {name: float(np.hypot(blob.x - x, blob.y - y)) for name, (x, y) in PLACES.items()}
    others = min(value for name, value in distance.items() if name != place)
    return _ramp(others - distance[place], 0.0, 5.0)


def _sized(size: str, blob: Blob) -> float:
    middle = sum(sum(half) for half in SIZES.values()) / 2  # width between small and large, in pixels
    width = (blob.width + blob.height) / 2
    margin = width - middle if size == "large" else middle - width
    return _ramp(margin, 0.0, 1.5)


def _in_line(layout: str, chosen: tuple[Blob, ...]) -> float:
    across = max(blob.x for blob in chosen) - min(blob.x for blob in chosen)
    down = max(blob.y for blob in chosen) - min(blob.y for blob in chosen)
    margin = across - down if layout == "row" else down - across
    return _ramp(margin, 0.0, 10.0)
