"""Images that are NaN in evaluations: reported, left out, and an error if there are no others."""

import math

import pytest
import torch
from helpers import PROMPTS

from diffusers_mixgrpo.training.nonfinite import NonFiniteError


def break_some(trainer, prompts):
    """Make the velocity NaN for images of these prompts."""
    encode = trainer.engine.encode

    def encode_some(texts, *args):
        conditioning = encode(texts, *args)
        for i, text in enumerate(texts):
            if text in prompts:
                conditioning.rows["prompt_embeds"][i] = math.nan
        return conditioning

    trainer.engine.encode = encode_some


def test_images_that_are_nan_are_left_out(make, caplog):
    trainer = make(eval_dataset=PROMPTS, per_device_eval_batch_size=2)
    whole = trainer.evaluate()
    rewards = trainer.eval_rewards
    assert whole["eval_nonfinite/images"] == 0
    break_some(trainer, ["sea"])
    metrics = trainer.evaluate()
    assert metrics["eval_nonfinite/images"] == 1 and metrics["eval_rewards/redness/failed"] == 1
    assert "1 of 2 images are infinite or NaN. Prompts: ['sea']" in caplog.text
    expected = rewards.clone()
    expected[:, 2] = math.nan
    torch.testing.assert_close(trainer.eval_rewards, expected, rtol=0, atol=0, equal_nan=True)
    assert metrics["eval_reward"] == pytest.approx(float(expected.nanmean()), abs=1e-12)
    for name in ("dark_share", "edge_density", "color_entropy", "spread"):
        assert math.isfinite(metrics[f"eval_images/{name}"])


def test_no_image_that_is_finite(make):
    trainer = make(eval_dataset=PROMPTS[:2])
    with torch.no_grad():
        trainer.pipe.transformer.proj_out.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="All 2 images of the evaluation are infinite or NaN"):
        trainer.evaluate()


def test_samples_that_are_nan_are_reported(make, caplog):
    trainer = make()
    break_some(trainer, ["red"])
    images = trainer.sample_images(["red", "sea"])
    assert len(images) == 2 and "1 of 2 images are infinite or NaN. Prompts: ['red']" in caplog.text
