"""
Cheap statistics of images that show how a policy exploits a reward: darkness, texture, few colors, little variety.

All are taken of images that are scaled down to `SIZE` x `SIZE` pixels, so that the cost is small, and the numbers do
not depend on the resolution.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image


SIZE = 64
DARK = 0.1
LEVELS = 4  # of each color channel in the histogram
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def downsample(images: Sequence[Image.Image]) -> np.ndarray:
    """
    Images as an array of shape `(n, SIZE, SIZE, 3)` of RGB values in [0, 255], uint8: means over boxes of pixels.
    """
    small = [image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image) for image in small])


def image_statistics(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """
    The statistics of each image by itself.

    Args:
        pixels (`np.ndarray` of shape `(n, SIZE, SIZE, 3)`): Images from [`downsample`].

    Returns:
        `dict[str, np.ndarray]`: [`dark_share`], [`edge_density`] and [`color_entropy`], each of shape `(n,)`.
    """
    return {
        "dark_share": dark_share(pixels),
        "edge_density": edge_density(pixels),
        "color_entropy": color_entropy(pixels),
    }


def dark_share(pixels: np.ndarray) -> np.ndarray:
    """Share of the pixels with a luma below `DARK` of white, in [0, 1]."""
    return (luma(pixels) < DARK).mean((1, 2))


def edge_density(pixels: np.ndarray) -> np.ndarray:
    """
    Mean magnitude of the luma's gradient, in [0, sqrt(2)]: differences between neighboring pixels of the small image,
    in units of white.
    """
    light = luma(pixels)
    across = light[:, :-1, 1:] - light[:, :-1, :-1]
    down = light[:, 1:, :-1] - light[:, :-1, :-1]
    return np.hypot(across, down).mean((1, 2))


def color_entropy(pixels: np.ndarray) -> np.ndarray:
    """
    Entropy of the image's colors in bits, in [0, 6]: of a histogram of `LEVELS` levels of red, green and blue each. An
    image of one color has 0, one of two equally frequent colors 1.
    """
    levels = (pixels // (256 // LEVELS)).astype(int)
    bins = (levels[..., 0] * LEVELS + levels[..., 1]) * LEVELS + levels[..., 2]
    entropies = []
    for image in bins:
        counts = np.bincount(image.ravel())
        shares = counts[counts > 0] / image.size
        entropies.append(-(shares * np.log2(shares)).sum())
    return np.abs(np.array(entropies))  # 0 rather than -0


def spread(pixels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """
    Root mean square difference between the images of the same prompts by two seeds, in [0, 1] of the range of RGB
    values. It falls to 0 when the policy draws one image per prompt whatever the noise.

    Args:
        pixels, others (`np.ndarray` of shape `(n, SIZE, SIZE, 3)`): Images from [`downsample`].

    Returns:
        `np.ndarray` of shape `(n,)`.
    """
    difference = (pixels.astype(float) - others) / 255
    return np.sqrt(np.square(difference).mean((1, 2, 3)))


def luma(pixels: np.ndarray) -> np.ndarray:
    """Luma of RGB values in [0, 255], in [0, 1], of shape `(n, SIZE, SIZE)`."""
    return pixels @ (_LUMA / 255)
