"""PickScore against the original's formula, with preprocessing and tokens made by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from toy_clip import PROMPTS, cropped, make_images, save_clip, save_tokenizer, token_ids

from diffusers_mixgrpo.rewards.pickscore import PickScoreReward


WORDS = ["a red cat", "", "far more words than the context has room for " * 5, "A  Tree ", "a red cat", "sea"]


def near(expected: list[float]):
    """Equal up to float32 rounding of the cosine, which the temperature of `exp(3)` multiplies."""
    return pytest.approx(expected, abs=1e-5 * math.exp(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pickscore")


@pytest.fixture(scope="module")
def clip(folder):
    return save_clip(folder)


@pytest.fixture(scope="module")
def reward(clip, folder):
    return PickScoreReward(str(folder), processor=str(folder))


@torch.no_grad()
def original_scores(clip, prompts, images):
    """The logit of each image with its own prompt, one pair at a time and without padding."""
    return [
        clip(input_ids=torch.tensor([token_ids(prompt)]), pixel_values=cropped(image)[None]).logits_per_image.item()
        for prompt, image in zip(prompts, images, strict=True)
    ]


def test_scores_are_the_originals(clip, reward):
    scores = reward(WORDS, make_images())
    expected = original_scores(clip, WORDS, make_images())
    assert clip.logit_scale.exp() > 5 and np.std(expected) > 1
    assert scores == near(expected)


def test_old_configurations_find_the_end_of_the_text_as_well(tmp_path):
    # Their end-of-text token is 2, a mistake of the time; the model then uses the highest token id.
    clip = save_clip(tmp_path, eos_token_id=2)
    scores = PickScoreReward(str(tmp_path), processor=str(tmp_path))(WORDS, make_images())
    assert scores == near(original_scores(clip, WORDS, make_images()))


def test_batches_do_not_matter(folder, reward):
    scores = reward(PROMPTS, make_images())
    for batch_size in (1, 4):
        other = PickScoreReward(str(folder), processor=str(folder), batch_size=batch_size)
        assert other(PROMPTS, make_images()) == near(scores)
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_bfloat16_is_near(folder, reward):
    half = PickScoreReward(str(folder), processor=str(folder), dtype=torch.bfloat16)
    assert half(PROMPTS, make_images()) == pytest.approx(reward(PROMPTS, make_images()), abs=1.0)


def test_an_unreadable_image_has_no_score(reward, tmp_path):
    whole = make_images()[0]
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    scores = reward(["a", "a", "a"], [None, Image.open(tmp_path / "cut.png"), whole], size=[1, 2, 3])
    assert scores[:2] == [None, None]
    assert scores[2:] == near(reward(["a"], [whole]))


def test_wrong_arguments(folder, reward, tmp_path):
    assert reward.__name__ == "pickscore" and reward.to("cpu") is reward
    with pytest.raises(OSError, match="(?s)`model`='/no/such' could not be loaded.*existing local file or folder"):
        PickScoreReward("/no/such", processor=str(folder))
    with pytest.raises(OSError, match="(?s)`processor`='/no/such' could not be loaded.*existing local"):
        PickScoreReward(str(folder), processor="/no/such")
    save_tokenizer(tmp_path)
    with pytest.raises(OSError, match="(?s)`processor`='.*' could not be loaded.*preprocessor_config.json"):
        PickScoreReward(str(folder), processor=str(tmp_path))
