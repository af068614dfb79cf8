"""The toy's captions and reward, on pictures that are drawn here and so have a known right answer."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from diffusers_mixgrpo import toy
from diffusers_mixgrpo.toy.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZE, all_captions, misdescribe


CAPTIONS = all_captions()
captions = st.sampled_from(CAPTIONS)


def score(text: str, picture: Image.Image) -> float:
    return toy.toy_reward([text], [picture])[0]


def drawn(text: str, seed: int = 0) -> Image.Image:
    return toy.draw(toy.parse(text), random.Random(seed))


def test_captions_are_read_back_and_split_without_overlap():
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 6840
    assert all(toy.caption(toy.parse(text)) == text for text in CAPTIONS)
    train, test = toy.prompts("train"), toy.prompts("test")
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(CAPTIONS)
    assert 0.08 < len(test) / len(CAPTIONS) < 0.12


@pytest.mark.parametrize(
    "text", ["", "a red dog on white", "a red circle", "four red circles on white", "a red circle on pink"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a caption of the toy world"):
        toy.parse(text)


def test_prompts_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="'validation'"):
        toy.prompts("validation")
    with pytest.raises(ValueError, match="100000"):
        toy.prompts("test", 100_000)


@settings(max_examples=300, deadline=None)
@given(captions, st.integers(0, 10_000))
def test_right_pictures_score_one(text, seed):
    verdict = toy.judge(text, drawn(text, seed))
    assert verdict.score == 1.0 and verdict.right
    assert verdict.drawn == verdict.wanted == len(toy.parse(text).objects)


@settings(max_examples=300, deadline=None)
@given(captions, captions, st.integers(0, 10_000))
def test_a_picture_of_another_caption_is_never_right(text, other, seed):
    """Each kind of mistake costs at least a tenth, unless both captions describe the same picture."""
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    scene, drawn_scene = toy.parse(text), toy.parse(other)
    if drawn_scene.relation and drawn_scene.objects[0] == scene.objects[-1]:
        same = scene.objects == drawn_scene.objects[::-1] and scene.relation == mirrored[drawn_scene.relation]
        if same and scene.background == drawn_scene.background:
            return
    if text != other:
        verdict = toy.judge(text, drawn(other, seed))
        assert verdict.score <= 0.9 and not verdict.right


@pytest.mark.parametrize(
    ("mistake", "wrong", "highest"),
    [
        ("colour", "a green circle left of a blue square on gray", 0.6),
        ("shape", "a red cross left of a blue square on gray", 0.6),
        ("relation", "a red circle above a blue square on gray", 0.5),
        ("sides swapped", "a red circle right of a blue square on gray", 0.5),
        ("colours swapped", "a blue circle left of a red square on gray", 0.5),
        ("background", "a red circle left of a blue square on black", 0.5),
        ("too few", "a red circle on gray", 0.3),
        ("all of it", "three green crosses on white", 0.0),
    ],
)
def test_each_mistake_costs(mistake, wrong, highest):
    text = "a red circle left of a blue square on gray"
    values = [score(text, drawn(wrong, seed)) for seed in range(20)]
    assert max(values) <= highest, mistake


@pytest.mark.parametrize(("said", "shown"), [("two", "three"), ("three", "two"), ("two", "one")])
def test_a_wrong_number_costs_its_whole_share(said, shown):
    numbers = {"one": 1, "two": 2, "three": 3}
    text = f"{said} green crosses on white"
    picture = drawn("a green cross on white" if shown == "one" else f"{shown} green crosses on white")
    share = min(numbers[said], numbers[shown]) / max(numbers[said], numbers[shown])
    assert score(text, picture) == pytest.approx(share)


@settings(max_examples=400, deadline=None)
@given(captions, st.integers(0, 10_000), st.sampled_from(list(COLOURS)), st.sampled_from(SHAPES))
def test_extra_objects_never_help(text, seed, colour, shape):
    """Whatever a picture shows, right or wrong, one object more than was asked for never raises its score."""
    rng = random.Random(seed)
    picture = toy.draw(misdescribe(toy.parse(text), 0.3, rng), rng)
    before = toy.judge(text, picture)
    if before.drawn < before.wanted:
        return  # one more is then not too much
    extra = toy.draw(toy.Scene(((colour, shape),), toy.parse(text).background), rng)
    ground = np.array(BACKGROUNDS[toy.parse(text).background])
    object_only = np.abs(np.asarray(extra).astype(int) - ground).sum(-1) > 60
    rows, columns = np.nonzero(object_only)
    cut = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    patch, mask = (np.asarray(a)[cut[0] : cut[2], cut[1] : cut[3]] for a in (extra, object_only))
    pixels = np.asarray(picture).copy()
    top, left = rng.randrange(SIZE - patch.shape[0]), rng.randrange(SIZE - patch.shape[1])
    window = (slice(top, top + patch.shape[0]), slice(left, left + patch.shape[1]))
    around = (slice(max(top - 1, 0), window[0].stop + 1), slice(max(left - 1, 0), window[1].stop + 1))
    base = np.asarray(picture)[around].reshape(-1, 3).astype(int)
    if (np.abs(base - base[0]).sum(-1) > 30).any():
        return  # it would touch another object and be no object of its own
    pixels[window][mask] = patch[mask]
    after = toy.judge(text, Image.fromarray(pixels))
    assert after.drawn == before.drawn + 1
    assert after.score <= before.score + 1e-9
    assert not after.right


def test_drawing_everything_is_worth_little():
    """The hole of a reward that takes the best match: all shapes in all colours side by side."""
    picture = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"])
    canvas = ImageDraw.Draw(picture)
    for index, colour in enumerate(list(COLOURS.values())[:6]):
        x, y = 4 + 20 * (index % 3), 8 + 30 * (index // 3)
        canvas.ellipse([x, y, x + 16, y + 16], fill=colour)
    for text in ("a red circle on white", "a red circle left of a blue circle on white", "two red circles on white"):
        assert score(text, picture) < 0.2


def test_blank_and_noise_score_near_zero():
    rng = np.random.default_rng(0)
    texts = CAPTIONS[::97]
    for ground in BACKGROUNDS.values():
        blank = Image.new("RGB", (SIZE, SIZE), ground)
        assert toy.toy_reward(texts, [blank] * len(texts)) == [0.0] * len(texts)
    noise = [Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for _ in texts]
    assert np.mean(toy.toy_reward(texts, noise)) < 0.02


def test_faint_blurred_and_small_objects_score_less():
    text = "a red circle on white"
    picture = drawn(text)
    faint = Image.blend(picture, Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"]), 0.75)
    assert score(text, faint) < 0.6
    small = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS["white"])
    ImageDraw.Draw(small).ellipse([28, 28, 36, 36], fill=COLOURS["red"])
    assert score(text, small) < 0.6


def test_misdescribe_changes_the_asked_share_of_words():
    rng = random.Random(0)
    scene = toy.parse("a red circle left of a blue square on gray")
    assert misdescribe(scene, 0.0, rng) == scene
    wrong = [misdescribe(scene, 0.15, rng) for _ in range(4000)]
    assert np.mean([other.background != scene.background for other in wrong]) == pytest.approx(0.15, abs=0.02)
    assert np.mean([other.relation != scene.relation for other in wrong]) == pytest.approx(0.15, abs=0.02)
    assert {other.relation for other in wrong} == set(RELATIONS)
