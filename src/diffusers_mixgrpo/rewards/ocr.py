"""OCR: whether an image shows the words that are quoted in its prompt."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ._clip import to_rgb


_DOUBLE = re.compile(r"“([^“”]+)”|„([^„“”]+)[“”]|«([^«»]+)»|「([^「」]+)」|(?<!\d)\"([^\"]+)\"")  # 5" is a length
_LETTER = "[0-9A-Za-z\u00c0-\u024f]"
_SINGLE = re.compile(  # but not the apostrophes of don't, dogs' and rock 'n' roll
    rf"(?<!{_LETTER})['‘](?!\s|n['’])((?:[^'‘’]|(?<={_LETTER})['’](?={_LETTER}))+)['’](?!{_LETTER})"
)
_SAME_SIGN = str.maketrans("‘’“”„", '\'\'"""')


class OCRReward:
    """
    Similarity of the text in an image and the quoted text in its prompt, in [0, 1].

    The score is one minus the Levenshtein edit distance between the two, divided by the length of the longer one, so
    extra words cost as much as missing ones. Case, white space and the style of quotes are ignored. Text is read in
    lines from top to bottom; several quoted parts are joined in their order. An image without text scores 0, and an
    image whose prompt quotes nothing cannot be scored (`None`).

    Recognized quotes are "...", “...”, „...“, «...», 「...」 and, in a prompt with none of these, '...' and ‘...’.

    Text is detected and recognized by RapidOCR with the PP-OCRv6 (small) models, which are part of its package: 32 MB,
    Apache-2.0. They support Latin, Greek, Chinese and Japanese letters, and rotated text; text with a confidence below
    50% is ignored. They run on the CPU with onnxruntime: about 0.3 s for an image of 512x512 pixels and 1 s for
    1024x1024, on one core. Text detection runs at no more than 960 pixels on the longer side.

    Args:
        num_threads (`int`, *optional*): Threads of onnxruntime in each process. Defaults to one per core.

    Raises:
        `ImportError`: If RapidOCR or onnxruntime is not installed.
        `ValueError`: If `num_threads` is less than 1.

    Example:

    ```python
    reward = OCRReward()
    scores = reward(['a sign that says "OPEN"'], [image])
    ```
    """

    __name__ = "ocr"

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"`num_threads` must be at least 1, got {num_threads}. Use None for one thread per core.")
        try:
            import onnxruntime  # noqa: F401
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"The OCR reward needs rapidocr and onnxruntime ({error}). Install them with "
                '`pip install "diffusers-mixgrpo[ocr]"`.'
            ) from error
        settings = {
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads or -1,
            "Global.log_level": "error",
            # The default enlarges the shorter side to 736 pixels, which takes minutes for a narrow strip.
            "Det.limit_type": "max",
            "Det.limit_side_len": 960,
        }
        self._engine: Any = RapidOCR(params=settings)

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
    ) -> list[float | None]:
        """
        Args:
            prompts (`list[str]` of length `n`), images (`list[PIL.Image.Image]` of length `n`):
                One prompt per image. Images may have any mode and size.
            columns: Ignored.

        Returns:
            `list[float | None]` of length `n`; `None` for a prompt without quotes or an image that cannot be decoded.

        Raises:
            `ValueError`: If the numbers of prompts and images differ.
        """
        if len(prompts) != len(images):
            raise ValueError(
                f"`prompts` and `images` must have the same length, got {len(prompts)} prompts and {len(images)} "
                "images. Pass one prompt per image."
            )
        return [self._score(quoted_text(prompt), image) for prompt, image in zip(prompts, images, strict=True)]

    def _score(self, wanted: str, image: Image.Image | None) -> float | None:
        if not _normalize(wanted):
            return None
        readable = to_rgb(image)
        if readable is None:
            return None
        return similarity(self.read(readable), wanted)

    def read(self, image: Image.Image) -> str:
        """The text in an image: its lines from top to bottom, joined by spaces."""
        found = self._engine(image.convert("RGB"))
        if not found.txts:
            return ""
        order = reading_order(np.asarray(found.boxes, dtype=np.float64))
        return " ".join(found.txts[i] for i in order)


def quoted_text(prompt: str) -> str:
    """
    The quoted parts of a prompt, joined by spaces; empty if it quotes nothing.

    Example:

    ```python
    >>> quoted_text('a shop with a sign "Fresh Bread" and a poster that says "50% off"')
    'Fresh Bread 50% off'
    ```
    """
    found = ["".join(filter(None, match.groups())) for match in _DOUBLE.finditer(prompt)]
    found = found or [match[1] for match in _SINGLE.finditer(prompt)]
    return " ".join(part.strip() for part in found)


def similarity(text: str, other: str) -> float:
    """One minus the edit distance over the length of the longer text. Case and white space are ignored."""
    text = _normalize(text)
    other = _normalize(other)
    longer = max(len(text), len(other))
    return 1.0 - edit_distance(text, other) / longer if longer else 1.0


def edit_distance(text: str, other: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(text, start=1):
        above = row
        row = [i]
        for j, b in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def reading_order(boxes: np.ndarray) -> list[int]:
    """
    The reading order of text boxes: lines from top to bottom, each from left to right. Lines may slope.

    Args:
        boxes (`np.ndarray` of shape `(n, 4, 2)`): Corners of each box, clockwise from the top left, in pixels.

    Returns:
        `list[int]` of length `n`: indices of the boxes.
    """
    along = (boxes[:, 1] - boxes[:, 0]).sum(axis=0)  # direction of the lines; longer boxes weigh more
    along /= np.linalg.norm(along) + 1e-9
    centers = boxes.mean(axis=1)
    x = centers @ along
    y = centers @ np.array([-along[1], along[0]])
    heights = np.linalg.norm(boxes[:, 3] - boxes[:, 0], axis=1)
    lines: list[list[int]] = []
    for i in np.argsort(y, kind="stable").tolist():
        if lines and y[i] - y[lines[-1][0]] < heights[lines[-1] + [i]].min() / 2:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: x[i])]


def _normalize(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).translate(_SAME_SIGN).casefold().split())
