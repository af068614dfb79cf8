"""The toy's captions and rewards, on images that are drawn here and therefore have a known content."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from diffusers_mixgrpo import toy
from diffusers_mixgrpo.toy.scenes import BACKGROUNDS, COLORS, LAYOUTS, PLACES, SHAPES, SIZE, all_captions, misdescribe


CAPTIONS = all_captions()
captions = st.sampled_from(CAPTIONS)


def score(text: str, image: Image.Image) -> float:
    return toy.toy_reward([text], [image])[0]


def drawn(text: str, seed: int = 0) -> Image.Image:
    return toy.draw(toy.parse(text), random.Random(seed))


def test_captions_are_parsed_and_split_without_overlap():
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 1008
    assert all(toy.caption(toy.parse(text)) == text for text in CAPTIONS)
    train, test = toy.prompts("train"), toy.prompts("test")
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(CAPTIONS)
    assert len(test) >= 200 and len(test) / len(CAPTIONS) < 0.3


@pytest.mark.parametrize(
    "text", ["", "a small red dog at the top on white", "a red circle", "four red circles in a row on white", "a cat"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="`text` must be a caption of the toy world, got"):
        toy.parse(text)


def test_wrong_arguments_of_prompts():
    with pytest.raises(ValueError, match="'validation'"):
        toy.prompts("validation")
    with pytest.raises(ValueError, match="100000"):
        toy.prompts("test", 100_000)


@settings(max_examples=300, deadline=None)
@given(captions, st.integers(0, 10_000))
def test_correct_images_score_one(text, seed):
    verdict = toy.judge(text, drawn(text, seed))
    assert verdict.score == 1.0
    assert verdict.drawn == verdict.wanted == toy.parse(text).number


def test_nearly_all_correct_images_are_wholly_right():
    """The strict criterion rejects a few of the smallest crosses."""
    assert np.mean(toy.wholly_right(CAPTIONS, [drawn(text) for text in CAPTIONS])) > 0.99


@settings(max_examples=300, deadline=None)
@given(captions, captions, st.integers(0, 10_000))
def test_an_image_of_another_caption_is_never_right(text, other, seed):
    if text != other:
        verdict = toy.judge(text, drawn(other, seed))
        assert verdict.score <= 2 / 3 + 1e-9 and not verdict.right


@pytest.mark.parametrize(
    ("mistake", "text", "shown", "score"),
    [
        ("color", "a large red circle at the left on gray", "a large green circle at the left on gray", 0.5),
        ("shape", "a large red circle at the left on gray", "a large red cross at the left on gray", 0.5),
        ("size", "a large red circle at the left on gray", "a small red circle at the left on gray", 0.6),
        ("place", "a large red circle at the left on gray", "a large red circle at the top on gray", 0.6),
        ("side", "a large red circle at the left on gray", "a large red circle at the center on gray", 0.6),
        ("background", "a large red circle at the left on gray", "a large red circle at the left on black", 0.6),
        ("both", "a large red circle at the left on gray", "a large red circle at the top on black", 0.36),
        ("all", "a large red circle at the left on gray", "a small green cross at the top on black", 0.0),
        ("one too many", "two red circles in a row on gray", "three red circles in a row on gray", 2 / 3),
        ("one too few", "three red circles in a row on gray", "two red circles in a row on gray", 2 / 3),
        ("layout", "two red circles in a row on gray", "two red circles in a column on gray", 0.6),
        ("only one", "two red circles in a row on gray", "a large red circle at the center on gray", 0.3),
    ],
)
def test_each_mistake_costs_what_it_should(mistake, text, shown, score):
    values = toy.toy_reward([text] * 20, [drawn(shown, seed) for seed in range(20)])
    assert np.allclose(values, score, atol=0.02), mistake


@settings(max_examples=400, deadline=None)
@given(captions, st.integers(0, 10_000), st.sampled_from(list(COLORS)), st.sampled_from(SHAPES))
def test_extra_objects_never_help(text, seed, color, shape):
    """An extra object never increases the score of an image, whether the image is correct or not."""
    rng = random.Random(seed)
    image = toy.draw(misdescribe(toy.parse(text), 0.3, rng), rng)
    before = toy.judge(text, image)
    if before.drawn < before.wanted:
        return  # another object would not be an extra one
    place, size = rng.choice(list(PLACES)), rng.choice(["small", "large"])
    extra = toy.draw(toy.Scene(1, color, shape, place, toy.parse(text).background, size), rng)
    ground = np.array(BACKGROUNDS[toy.parse(text).background])
    object_only = np.abs(np.asarray(extra).astype(int) - ground).sum(-1) > 60
    rows, columns = np.nonzero(object_only)
    cut = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    patch, mask = (np.asarray(a)[cut[0] : cut[2], cut[1] : cut[3]] for a in (extra, object_only))
    pixels = np.asarray(image).copy()
    top, left = rng.randrange(SIZE - patch.shape[0]), rng.randrange(SIZE - patch.shape[1])
    window = (slice(top, top + patch.shape[0]), slice(left, left + patch.shape[1]))
    around = (slice(max(top - 1, 0), window[0].stop + 1), slice(max(left - 1, 0), window[1].stop + 1))
    base = np.asarray(image)[around].reshape(-1, 3).astype(int)
    if (np.abs(base - ground).sum(-1) > 30).any():
        return  # it would touch another object and not count as a separate one
    pixels[window][mask] = patch[mask]
    after = toy.judge(text, Image.fromarray(pixels))
    assert after.drawn == before.drawn + 1
    assert after.score <= before.score + 1e-9
    assert not after.right


def test_drawing_everything_is_worth_little():
    """All colors side by side would exploit a reward that takes the best match."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"])
    canvas = ImageDraw.Draw(image)
    for index, color in enumerate(list(COLORS.values())[:6]):
        x, y = 4 + 20 * (index % 3), 8 + 30 * (index // 3)
        canvas.ellipse([x, y, x + 16, y + 16], fill=color)
    for text in ("a large red circle at the left on white", "two red circles in a row on white"):
        assert score(text, image) < 0.2


def test_blank_and_noise_score_near_zero():
    rng = np.random.default_rng(0)
    texts = CAPTIONS[::17]
    for ground in BACKGROUNDS.values():
        blank = Image.new("RGB", (SIZE, SIZE), ground)
        assert toy.toy_reward(texts, [blank] * len(texts)) == [0.0] * len(texts)
    noise = [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in texts]
    assert np.mean(toy.toy_reward(texts, noise)) < 0.02


def test_faint_and_tiny_objects_score_less():
    text = "a large red circle at the center on white"
    image = drawn(text)
    faint = Image.blend(image, Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"]), 0.75)
    assert score(text, faint) < 0.6
    tiny = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"])
    ImageDraw.Draw(tiny).ellipse([29, 29, 34, 34], fill=COLORS["red"])
    assert score(text, tiny) < 0.4


def test_misdescribe_changes_the_asked_share_of_words():
    rng = random.Random(0)
    scene = toy.parse("a small red circle at the top on gray")
    assert misdescribe(scene, 0.0, rng) == scene
    wrong = [misdescribe(scene, 0.15, rng) for _ in range(4000)]
    for attribute in ("color", "shape", "place", "background", "size"):
        share = np.mean([getattr(other, attribute) != getattr(scene, attribute) for other in wrong])
        assert share == pytest.approx(0.15, abs=0.02), attribute
    assert {other.place for other in wrong} == set(PLACES)
    several = [misdescribe(toy.parse("two red circles in a row on gray"), 0.5, rng) for _ in range(200)]
    assert {other.place for other in several} == set(LAYOUTS) and {other.number for other in several} == {2, 3}
    assert all(toy.caption(other) in CAPTIONS for other in wrong + several)
