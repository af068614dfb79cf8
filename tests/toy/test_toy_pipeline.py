"""The bundled pipeline: complete, small, made of stock classes, and imperfect at following prompts."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextModel, T5EncoderModel

from diffusers_mixgrpo import MixedODESDEScheduler, toy


@pytest.fixture(scope="module")
def pipe():
    pipe = toy.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_images(pipe, prompts, **kwargs):
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    options = {"num_inference_steps": 10, "max_sequence_length": 12, "height": 64, "width": 64} | kwargs
    return pipe(prompts, generator=generators, **options).images


def test_it_is_small_and_complete():
    files = [file for file in Path(toy.path()).rglob("*") if file.is_file()]
    assert 1e6 < sum(file.stat().st_size for file in files) < 8e6
    assert not [file for file in files if file.suffix not in (".json", ".safetensors", ".txt")]


def test_stock_classes_in_the_layout_of_flux_dev(pipe):
    stock = FluxPipeline.from_pretrained(toy.path())
    assert type(stock.transformer) is FluxTransformer2DModel and stock.transformer.config.guidance_embeds
    assert type(stock.vae) is AutoencoderKL and stock.vae_scale_factor == 8
    assert type(stock.text_encoder) is CLIPTextModel and type(stock.text_encoder_2) is T5EncoderModel
    assert type(stock.scheduler) is FlowMatchEulerDiscreteScheduler and stock.scheduler.config.use_dynamic_shifting
    for part in (stock.transformer, stock.vae, stock.text_encoder, stock.text_encoder_2):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert stock.text_encoder.config.eos_token_id == stock.tokenizer.eos_token_id
    loaded, expected = (np.asarray(make_images(p, toy.prompts("test", 1))[0], dtype=int) for p in (pipe, stock))
    assert np.abs(loaded - expected).max() <= 1  # float32 rounding may move a pixel to the next 8-bit value


def test_every_word_is_known(pipe):
    texts = toy.prompts("test", 200) + toy.prompts("train", 200)
    t5 = pipe.tokenizer_2(texts, padding="max_length", max_length=12).input_ids
    assert not [ids for ids in t5 if pipe.tokenizer_2.unk_token_id in ids]
    assert all(pipe.tokenizer_2.eos_token_id in ids for ids in t5)  # 12 tokens hold every caption
    clip = pipe.tokenizer(texts, padding="max_length", max_length=pipe.tokenizer_max_length).input_ids
    assert all(ids.count(pipe.tokenizer.eos_token_id) >= 1 and len(ids) == 32 for ids in clip)
    assert pipe.tokenizer.decode(clip[0], skip_special_tokens=True).strip() == texts[0]


def test_it_follows_held_out_prompts_often_but_not_always(pipe):
    prompts = toy.prompts("test", 128)
    scores = toy.toy_reward(prompts, make_images(pipe, prompts))
    assert 0.5 < np.mean(scores) < 0.8
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert np.mean(toy.toy_reward(shuffled, make_images(pipe, prompts))) < 0.5 * np.mean(scores)


def test_defaults_are_right_for_a_plain_call(pipe):
    """The defaults of `pipe(prompt)`: 64x64 pixels and 512 T5 tokens."""
    prompts = toy.prompts("test", 12)
    images = pipe(prompts, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (64, 64)
    assert np.mean(toy.toy_reward(prompts, images)) > 0.4  # the same images score 0.03 for other prompts


def test_the_vae_keeps_what_the_reward_sees(pipe):
    prompts = toy.prompts("test", 64)
    drawn = [toy.draw(toy.parse(prompt), random.Random(index)) for index, prompt in enumerate(prompts)]
    batch = pipe.image_processor.preprocess(drawn)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(batch).latent_dist.mean).sample
    back = pipe.image_processor.postprocess(decoded)
    assert np.mean(toy.toy_reward(prompts, back)) > 0.97
    assert 10 * np.log10(4 / (decoded - batch).square().mean().item()) > 32  # PSNR in dB


def test_it_runs_with_the_mixed_scheduler(pipe):
    pipe = FluxPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MixedODESDEScheduler.from_config(pipe.scheduler.config, window_start=2, window_size=4)
    make_images(pipe, toy.prompts("test", 2))
    assert pipe.scheduler.window_log_probs.shape == (2, 4)
