"""Grids of images: what stands where, at which size."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from diffusers_mixgrpo.reports.fonts import font_for, shorten, wrap
from diffusers_mixgrpo.reports.sample_grid import (
    GAP,
    LARGEST,
    MARGIN,
    MARKS,
    Block,
    Tile,
    draw_grid,
    draw_samples,
    number,
    readable,
    scale,
    score_lines,
)
from diffusers_mixgrpo.training.samples import Sample, Samples


COLORS = ["red", "lime", "blue", "cyan", "magenta", "yellow", "black", "gray"]
LONG = "an old lighthouse on a rocky cliff above a stormy sea at dusk, " * 4


def samples_of(rewards, prompts=("a cat", "a dog"), size=(64, 64), names=("toy_reward",)):
    count = len(rewards) // len(prompts)
    fixed = [
        Sample(
            prompts[i // count],
            Image.new("RGB", size, COLORS[i]),
            {name: reward if j == 0 or reward is None else reward + j for j, name in enumerate(names)},
            reward if reward is None or len(names) == 1 else reward + 0.5,
            seed=i,
        )
        for i, reward in enumerate(rewards)
    ]
    return Samples(120, 400, fixed, count, [])


def places(grid, color):
    """The box of a color in a grid: left, top, right, bottom."""
    rows, columns = np.nonzero((np.asarray(grid) == ImageColor.getrgb(color)).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (256, 256)),
        ((32, 32), (256, 256)),
        ((100, 100), (300, 300)),
        ((300, 300), (300, 300)),
        ((720, 720), (LARGEST, LARGEST)),
        ((720, 1280), (288, 512)),
        ((1280, 720), (512, 288)),
    ],
)
def test_tiles_keep_the_aspect_ratio_and_are_neither_tiny_nor_huge(size, expected):
    assert scale(Image.new("RGBA", size)).size == expected


def test_small_images_are_enlarged_without_blur():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(scale(Image.fromarray(pixels))), pixels.repeat(4, 0).repeat(4, 1))


def test_images_of_a_prompt_stand_side_by_side_and_aligned():
    grid = draw_samples(samples_of([0.5, 0.5, 0.5, 0.5], prompts=(LONG, "a dog")))
    boxes = [places(grid, color) for color in COLORS[:4]]
    assert [box[0] for box in boxes] == [MARGIN, MARGIN + 264, 2 * MARGIN + 520, 2 * MARGIN + 520 + 264]
    assert len({(box[1], box[3]) for box in boxes}) == 1  # also below prompts of other lengths
    assert all(box[2] - box[0] == 256 for box in boxes)


def test_many_images_of_a_prompt_continue_below():
    grid = draw_samples(samples_of([0.5] * 8, prompts=("a cat",), size=(512, 512)))
    assert grid.width == 2 * MARGIN + 4 * LARGEST + 3 * GAP
    assert places(grid, "red")[3] < places(grid, "magenta")[1] and places(grid, "magenta")[0] == MARGIN


@pytest.mark.parametrize("prompt", ["a cat", LONG, "word" * 100, "猫" * 300])
@pytest.mark.parametrize("names", [["toy_reward"], ["hpsv2", "clipscore", "a_reward_with_a_name_that_is_very_long"]])
def test_scores_are_drawn_below_each_image_whatever_the_prompt(prompt, names):
    values = [0.25, None]
    grid = np.asarray(draw_samples(samples_of(values, prompts=(prompt,), names=names)).convert("L"))
    left, _, right, bottom = 0, 0, 256, places(draw_samples(samples_of(values, (prompt,), names=names)), "red")[3]
    lines = len(names) + (len(names) > 1)
    for i in range(2):
        x = MARGIN + i * (256 + GAP)
        for line in range(lines):
            y = bottom + GAP + line * 21
            assert (grid[y : y + 21, x + left : x + right] < 128).any(), (i, line)


def test_the_weighted_reward_is_shown_unless_it_is_one_of_the_rewards():
    image = Image.new("RGB", (8, 8))

    def sample(reward, **rewards):
        return Sample("a cat", image, rewards, reward)

    one = [sample(0.5, red=0.5, watched=0.5), sample(None, red=None, watched=1.0)]
    assert score_lines(one) == [
        [("red", "0.500"), ("watched", "0.500")],
        [("red", "not scored"), ("watched", "1.000")],
    ]
    two = [sample(1.0, red=1.0, sharp=1.0), sample(0.5, red=1.0, sharp=0.0)]  # that they are equal once is chance
    assert [[name for name, _ in lines] for lines in score_lines(two)] == [["reward", "red", "sharp"]] * 2


def test_a_long_name_is_shortened_and_the_value_is_not():
    """The end of the line is the value: it looks the same behind a long name."""
    images = []
    for name in ("n" * 30, "n" * 90):
        grid = draw_grid("", "", [Block("", [Tile(Image.new("RGB", (64, 64), "red"), [(name, "0.125")])])])
        bottom = places(grid, "red")[3]
        images.append(np.asarray(grid)[bottom : bottom + 40])
    np.testing.assert_array_equal(*images)
    assert (images[0][:, MARGIN + 256 - 50 : MARGIN + 256] < 128).any()


def test_the_best_and_the_worst_have_a_frame_and_a_word():
    grid = draw_samples(samples_of([0.5, 0.9, 0.1, None]))
    for mark, color in (("best", "lime"), ("worst", "blue")):
        inner, outer = places(grid, color), places(grid, MARKS[mark])
        assert (outer[0], outer[1]) == (inner[0] - 5, inner[1] - 5)
        assert outer[3] > inner[3] + 20  # the word's background, below the image
    same = np.asarray(draw_samples(samples_of([0.5, 0.5, None, 0.5])))
    for color in MARKS.values():
        assert not (same == ImageColor.getrgb(color)).all(-1).any()


def test_the_step_is_in_the_title():
    grids = [np.asarray(draw_samples(samples_of([0.5, 0.9]))), None]
    other = samples_of([0.5, 0.9])
    grids[1] = np.asarray(draw_samples(Samples(121, 400, other.fixed, 1, [])))
    changed = np.nonzero((grids[0] != grids[1]).any((1, 2)))[0]
    assert len(changed) and changed.max() < 2 * MARGIN + 34


def test_names_and_numbers_for_people():
    assert [readable(name) for name in ("toy_reward", "hpsv2", "<lambda>", "_")] == [
        "toy reward",
        "hpsv2",
        "lambda",
        "reward",
    ]
    values = (0.8312, 0.5, -0.0314, 22.123, 12345.0, None, float("nan"))
    assert [number(v) for v in values] == [
        "0.831",
        "0.500",
        "-0.031",
        "22.12",
        "1.234e+04",
        "not scored",
        "not scored",
    ]


@pytest.mark.parametrize("text", ["one two three", LONG, "x" * 300, "a " + "猫" * 200, "", "  spaces\n\tand lines  "])
def test_wrapped_text_fits_and_is_whole_or_ends_with_an_ellipsis(text):
    font, _ = font_for(text, 18)
    lines = wrap(text, font, 200, max_lines=3)
    assert len(lines) <= 3 and all(font.getlength(line) <= 200 for line in lines)
    together = "".join("".join(lines).split())
    whole = "".join(text.split())
    assert together == whole or (together.endswith("…") and whole.startswith(together[:-1]) and len(together) > 20)
    assert shorten("abc", font, 200) == "abc"


def test_a_font_that_has_the_characters():
    latin, is_readable = font_for("a fat cat", 18)
    assert is_readable and latin.getname()[0] == "Aileron"
    private, is_readable = font_for("\ue123\ue124\ue125", 18)  # which no font defines, or only for itself
    assert not is_readable or private.getname()[0] != "Aileron"
