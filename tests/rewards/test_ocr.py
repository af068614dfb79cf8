"""OCR: quoted words in prompts, text similarity, and real text in images."""

import functools
import io
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from diffusers_mixgrpo.rewards.ocr import OCRReward, edit_distance, quoted_text, reading_order, similarity


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello World"', "Hello World"),
        ("a sign that says “Hello World”", "Hello World"),
        ('a shop "Fresh Bread" with a poster " 50% off "', "Fresh Bread 50% off"),
        ("ein Schild „Hallo“, un panneau «Salut»", "Hallo Salut"),
        ('写着"你好"的牌子', "你好"),
        ("写着“你好”的牌子, 「本」", "你好 本"),
        ('a 5" screen that shows "HELLO", and a 7" one', "HELLO"),
        ("a sign that says 'Don't stop'", "Don't stop"),
        ("a sign that says ‘Don’t stop’, twice", "Don’t stop"),
        ("'STOP' and 'GO'", "STOP GO"),
        ("the dog's toy says \"it's 'mine'\"", "it's 'mine'"),
        ("the dogs' bowl and the cat's toy don't match", ""),
        ("rock 'n' roll in the '90s", ""),
        ("rock 'n' roll, a banner 'Live'", "Live"),
        ('an unfinished "quote', ""),
        ('nothing "" at all', ""),
        ("a red cube", ""),
        ("", ""),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("text", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance_known(text, other, distance):
    assert edit_distance(text, other) == distance


@given(st.text("ab", max_size=6), st.text("abc", max_size=6))
@settings(max_examples=60, deadline=None)
def test_edit_distance_by_its_definition(text, other):
    """Against the recursion over the last letters."""

    @functools.cache
    def distance(i, j):
        if min(i, j) == 0:
            return max(i, j)
        swap = distance(i - 1, j - 1) + (text[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, swap)

    assert edit_distance(text, other) == distance(len(text), len(other))
    assert edit_distance(text, other) == edit_distance(other, text)
    assert 0 <= similarity(text, other) <= 1


def test_similarity():
    assert similarity("HELLO  world\n", "Hello World") == 1
    assert similarity("Don’t", "don't") == 1 and similarity("Ｏｐｅｎ！", "open!") == 1
    assert similarity("open", "") == 0
    assert similarity("open", "xyzw") == 0
    assert similarity("open", "opal") == 0.5
    assert similarity("open open", "open") == 0.5  # extra text lowers the score
    assert similarity("", "") == 1


def box(x, y, width=40, height=20, angle=0.0):
    """The corners of a box whose top left is at (x, y), turned with the page about (0, 0)."""
    corners = np.array([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], dtype=float)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return corners @ np.array([[cos, sin], [-sin, cos]])


@pytest.mark.parametrize("angle", [-25, 0, 25])
def test_reading_order(angle):
    """Two lines of two boxes, the second box slightly lower than the first, in any order of detection."""
    page = [(0, 0, 40, 20), (300, 6, 60, 24), (0, 30, 30, 20), (200, 26, 40, 20)]
    boxes = np.stack([box(*place, angle=angle) for place in page])
    for order in itertools.permutations(range(4)):
        assert [order[i] for i in reading_order(boxes[list(order)])] == [0, 1, 2, 3]


def test_missing_packages(monkeypatch):
    for name in ("rapidocr", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=r'pip install "diffusers-mixgrpo\[ocr\]"'):
                OCRReward()


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return OCRReward(num_threads=1)


def draw(*lines, angle=0, size=(320, 320)):
    """Lines of dark text on a light background, each a list of (x, text), rotated by `angle` degrees."""
    image = Image.new("RGB", size, "ivory")
    font = ImageFont.load_default(size=40)
    for i, line in enumerate(lines):
        for x, text in [(20, line)] if isinstance(line, str) else line:
            ImageDraw.Draw(image).text((x, 90 + 60 * i), text, font=font, fill="navy")
    return image.rotate(angle, fillcolor="ivory")


def test_reads_images(reward):
    """Correct, wrong, nearly correct, extra text, no text, and a prompt without quotes."""
    images = [
        draw("Hello World"),
        draw("Hold"),
        draw("Hello Word"),
        draw("Hello World", "again"),
        draw(),
        draw("Hi"),
    ]
    prompts = ['a sign that says "hello world"'] * 5 + ["a sign that says Hi"]
    scores = reward(prompts, images, difficulty=[1] * 6)
    assert scores == pytest.approx([1, 0.4, 0.9, 10 / 15, 0, None])
    assert reward.__name__ == "ocr"


def test_reads_lines_in_order(reward):
    assert reward.read(draw("Fresh", "Bread")) == "Fresh Bread"


def test_reads_sloping_lines(reward):
    """Two distant words of one line: the second is higher on the page but is read after the first."""
    assert reward.read(draw([(20, "Left"), (210, "Right")], angle=12)) == "Left Right"


def test_reads_vertical_text(reward):
    assert reward(["'OPEN'"], [draw("OPEN", angle=90)]) == [1]


def test_other_modes_and_broken_files(reward):
    file = io.BytesIO()
    draw("OPEN").save(file, "PNG")
    broken = Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))
    odd = [Image.new("RGBA", (8, 8)), Image.new("L", (1, 1)), Image.new("RGB", (2, 300)), Image.new("RGB", (900, 20))]
    scores = reward(["'OPEN'"] * 7, [draw("OPEN").convert("L"), broken, None, *odd])
    assert scores == [1, None, None, 0, 0, 0, 0]


def test_errors():
    with pytest.raises(ValueError, match="`num_threads` must be at least 1, got 0. Use None"):
        OCRReward(num_threads=0)


def test_one_prompt_per_image(reward):
    with pytest.raises(ValueError, match="2 prompts and 1 images"):
        reward(["a", "a"], [draw()])
