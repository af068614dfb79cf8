"""Image statistics against closed forms."""

import math

import numpy as np
import pytest
from PIL import Image

from diffusers_mixgrpo.training.image_statistics import SIZE, downsample, image_statistics, luma, spread


def plain(color, size=(96, 80)):
    return Image.new("RGB", size, color)


def halves(left, right, size=(128, 128)):
    """An image of two colors side by side."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def checkerboard(cell=1, scale=1):
    cells = np.indices((SIZE, SIZE)).sum(0) // cell % 2
    pixels = np.uint8(255 * cells).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(pixels).convert("RGB")


def of(*images):
    return {name: values.tolist() for name, values in image_statistics(downsample(images)).items()}


def test_images_of_one_color():
    statistics = of(plain("black"), plain("white"), plain((200, 30, 90)))
    assert statistics == {"dark_share": [1, 0, 0], "edge_density": [0, 0, 0], "color_entropy": [0, 0, 0]}


def test_two_colors():
    (image,) = downsample([halves("black", "white")])
    assert (image[:, : SIZE // 2] == 0).all() and (image[:, SIZE // 2 :] == 255).all()
    statistics = of(halves("black", "white"))
    assert statistics["dark_share"] == [0.5] and statistics["color_entropy"] == [1]
    # One of the SIZE - 1 columns of differences is an edge of the whole range.
    assert statistics["edge_density"] == pytest.approx([1 / (SIZE - 1)])
    assert of(halves("red", "blue"))["edge_density"] == pytest.approx([(0.299 - 0.114) / (SIZE - 1)])


def test_a_checkerboard_has_the_largest_edge_density():
    assert of(checkerboard())["edge_density"] == pytest.approx([math.sqrt(2)])
    assert of(checkerboard())["color_entropy"] == [1]


def test_all_colors_have_the_largest_entropy():
    levels = np.stack(np.meshgrid([0, 64, 128, 192], [63, 127, 191, 255], [10, 80, 150, 220]), -1)
    pixels = np.uint8(levels.reshape(1, 64, 3)).repeat(SIZE, 0)
    assert of(Image.fromarray(pixels))["color_entropy"] == [6]


def test_the_limit_of_darkness():
    # 25 / 255 = 0.098 and 26 / 255 = 0.102
    assert of(plain((25, 25, 25)), plain((26, 26, 26)))["dark_share"] == [1, 0]


def test_luma():
    colors = downsample([plain(color) for color in ("red", "lime", "blue", "white")])
    assert luma(colors)[:, 0, 0] == pytest.approx([0.299, 0.587, 0.114, 1])


def test_statistics_do_not_depend_on_the_resolution():
    assert of(checkerboard(2, scale=3), checkerboard(2, scale=7)) == of(checkerboard(2), checkerboard(2))
    assert of(halves("red", "black", (64, 64))) == of(halves("red", "black", (256, 1024)))


def test_modes_of_images():
    assert of(plain("white").convert("L"), plain("white").convert("RGBA")) == of(plain("white"), plain("white"))


def test_spread():
    first = downsample([plain("black"), plain("red"), checkerboard(), plain("gray")])
    second = downsample([plain("white"), plain("black"), plain("black"), plain("gray")])
    # All of the range; one of three channels; half of the pixels
    expected = [1, math.sqrt(1 / 3), math.sqrt(1 / 2), 0]
    assert spread(first, second) == pytest.approx(expected)
    assert spread(second, first) == pytest.approx(expected)
