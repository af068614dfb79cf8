"""Families that edit an image: each does what its stock pipeline does, and trains. As `test_families.py`."""

import copy
import functools
import inspect
import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from helpers import assert_same, make_trainer, redness, trained
from miniatures import EDITING
from peft import LoraConfig
from PIL import Image

from diffusers_mixgrpo import MixedODESDEScheduler, hybrid_inference, policy_class, sample_trajectories
from diffusers_mixgrpo.policies import FAMILIES, PipelinePolicy
from diffusers_mixgrpo.policies.prompt_embeds import CachedPrompts, cache_folder, cache_prompts
from diffusers_mixgrpo.training.datasets import open_images


TEXTS = ["a cat", "two big dogs"]  # of different lengths
SEEDS = [11, 12]
STEPS = 4
# Guidance scales without and with a second pass. FLUX.1-Kontext has none.
SCALES = {"flux-kontext": (0.0, 3.5), "qwen-image-edit": (1.0, 4.0), "qwen-image-edit-plus": (1.0, 4.0)}
CASES = [(name, scale) for name, scales in SCALES.items() for scale in scales]
FAMILY = pytest.mark.parametrize("family", EDITING)
# Most of the time goes to the image of a megapixel that Qwen-Image-Edit encodes, whatever the size of its result.
SLOW_FAMILY = pytest.mark.parametrize(
    "family", ["flux-kontext", *(pytest.param(name, marks=pytest.mark.slow) for name in list(EDITING)[1:])]
)


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC)


PHOTOS = [photo(0, (90, 60)), photo(1, (70, 100))]  # one with the aspect ratio of the results, and one without


@functools.cache
def shared(family: str) -> DiffusionPipeline:
    """The miniature pipeline of a family; tests must leave it as it is."""
    return EDITING[family]()


def copied(family: str) -> DiffusionPipeline:
    pipe = shared(family)
    own = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    own.set_progress_bar_config(disable=True)
    return own


def size_of(family: str) -> dict[str, int]:
    return {"height": 32, "width": 48} if family == "flux-kontext" else {"height": 64, "width": 96}


def make_policy(family, scale, length=24, pipe=None) -> PipelinePolicy:
    pipe = shared(family) if pipe is None else pipe
    policy = policy_class(type(pipe).__name__)
    return policy(pipe, **size_of(family), num_inference_steps=STEPS, guidance_scale=scale, max_sequence_length=length)


def like_stock(family, scale, texts) -> PipelinePolicy:
    """With texts padded to the longest of them, as the stock pipelines do that pad to the longest of a call."""
    if family == "flux-kontext":
        return make_policy(family, scale)
    conditioning = encode(family, 1.0, tuple(texts), tuple(range(len(texts))))
    unused = conditioning.rows["prompt_mask"].shape[1] - int(conditioning.rows["prompt_mask"].sum(1).max())
    return make_policy(family, scale, 24 - unused)


@functools.cache
def encode(family, scale, texts, photos, length=24):
    """The conditioning of the shared pipeline; it takes long, and nothing changes it."""
    policy = make_policy(family, scale, length)
    return policy.encode(texts, [policy.fit_image(PHOTOS[i]) for i in photos])


def conditioning_of(policy, texts, photos):
    family = next(name for name in EDITING if shared(name) is policy.pipe)
    return encode(family, policy.guidance_scale, tuple(texts), tuple(photos), policy.max_sequence_length)


def stock(policy, texts, photos, seeds=SEEDS, **arguments):
    """The output of the stock pipeline's `__call__`, which gets the images as they are."""
    arguments = policy.arguments_of(texts, [PHOTOS[i] for i in photos]) | arguments
    generators = [torch.Generator().manual_seed(seed) for seed in seeds[: len(texts)]]
    return policy.pipe(generator=generators, **arguments).images


def roll_out(policy, texts, photos, seeds=SEEDS, group=1, start=0, size=0, **config):
    scheduler = MixedODESDEScheduler.from_config(
        policy.pipe.scheduler.config, window_start=start, window_size=size, **config
    )
    return sample_trajectories(
        policy,
        scheduler,
        conditioning_of(policy, texts, photos),
        policy.initial_latents(seeds[: len(texts)]),
        num_generations=group,
        generator=torch.Generator().manual_seed(0),
    )


def assert_same_images(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(own), np.asarray(other))
        assert np.asarray(own).std() > 5


# ---- Rollouts ----


@pytest.mark.parametrize(
    "family, scale, photos",
    [
        (family, scale, photos)
        for family, scale in CASES
        for photos in ([0], [1], [0, 1])
        if photos != [0, 1] or family != "qwen-image-edit-plus"  # whose pipeline takes one prompt at a time
    ],
)
def test_a_rollout_without_a_window_is_the_stock_pipeline(family, scale, photos):
    texts = [TEXTS[i] for i in photos]
    policy = like_stock(family, scale, texts)
    assert policy.is_guided == (family != "flux-kontext" and scale > 1)
    trajectory = roll_out(policy, texts, photos)
    assert torch.equal(trajectory.latents, torch.as_tensor(stock(policy, texts, photos, output_type="latent")))
    assert_same_images(policy.decode(trajectory.latents), stock(policy, texts, photos))


@FAMILY
def test_an_image_of_the_right_aspect_ratio_is_used_as_the_stock_pipeline_uses_it(family):
    policy = like_stock(family, SCALES[family][1], TEXTS[:1])
    whole = policy.call_arguments | {"prompt": TEXTS[0], "image": PHOTOS[0]}
    if family == "flux-kontext":  # which takes an image as large as it comes, unless it chooses a size itself
        whole["image"] = PHOTOS[0].resize((policy.width, policy.height), Image.Resampling.LANCZOS)
    images = policy.pipe(generator=torch.Generator().manual_seed(SEEDS[0]), **whole).images
    assert_same_images(policy.decode(roll_out(policy, TEXTS[:1], [0]).latents), images)


@FAMILY
def test_the_shared_prefix_is_the_stock_pipelines(family):
    policy = like_stock(family, SCALES[family][1], TEXTS[:1])
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    stock(policy, TEXTS[:1], [1], output_type="latent", callback_on_step_end=keep)
    trajectory = roll_out(policy, TEXTS[:1], [1], group=3, start=2, size=1)
    assert trajectory.states.shape == (3, 2, *policy.latent_shape)
    assert torch.equal(trajectory.states[:, 0], states[1].repeat_interleave(3, 0))


# See `test_families.py` for the tolerance.
@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
@FAMILY
def test_the_ratio_is_one_before_the_first_update(family, sde_type):
    policy = make_policy(family, SCALES[family][1])
    trajectory = roll_out(policy, TEXTS, [0, 1], group=2, start=1, size=2, sde_type=sde_type)
    images, steps = trajectory.transition_indices()
    assert len(images) == 8
    for size in (1, 3, 8):
        for part in torch.arange(len(images)).split(size):
            with torch.no_grad():
                replay = trajectory.replay(policy, images[part], steps[part])
            ratio = torch.exp(replay.log_probs - trajectory.log_probs[images[part], steps[part]])
            assert (ratio - 1).abs().max() <= 1e-5


@FAMILY
def test_a_prompt_is_the_same_in_each_batch(family):
    together, alone = encode(family, 4.0, tuple(TEXTS), (0, 1)), encode(family, 4.0, tuple(TEXTS[1:]), (1,))
    for name, rows in together.rows.items():
        torch.testing.assert_close(rows[1:], alone.rows[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(together.rows["image_latents"][1:], alone.rows["image_latents"])  # encoded one by one


@FAMILY
@torch.no_grad()
def test_another_image_is_another_velocity(family):
    """By the transformer's tokens of it, and with Qwen-Image-Edit by what the language model sees of it too."""
    policy = make_policy(family, SCALES[family][1])
    latents = policy.initial_latents(SEEDS[:1])
    first, second = (encode(family, SCALES[family][1], (TEXTS[0],), (i,)) for i in range(2))
    velocity = policy.velocity(latents, torch.tensor(700.0), first)
    assert velocity.shape == latents.shape
    changed = [name for name, rows in first.rows.items() if not torch.equal(rows, second.rows[name])]
    assert set(changed) == {"image_latents"} | (
        {"prompt_embeds", "negative_prompt_embeds"}
        & set(first.rows) - ({"prompt_embeds"} if family == "flux-kontext" else set())
    )
    for name in changed:
        other = type(first)(first.rows | {name: second.rows[name]}, first.shared)
        assert (policy.velocity(latents, torch.tensor(700.0), other) - velocity).abs().max() > 1e-4


def test_images_are_cropped_around_their_center():
    policy = make_policy("flux-kontext", 3.5)
    marked = Image.new("RGBA", (300, 32), "red")
    marked.paste("blue", (126, 0, 174, 32))  # the 48 columns in the middle
    fitted = policy.fit_image(marked)
    assert (fitted.size, fitted.mode) == ((48, 32), "RGB")
    assert np.array_equal(np.asarray(fitted), np.asarray(Image.new("RGB", (48, 32), "blue")))
    assert policy.fit_image(fitted).tobytes() == fitted.tobytes()


@pytest.mark.parametrize("height, width", [(64, 64), (64, 96), (64, 160), (1328, 800), (480, 2048), (1024, 1536)])
def test_the_size_that_qwen_image_edit_encodes_is_its_pipelines_own(height, width):
    pipe = shared("qwen-image-edit")
    policy = policy_class("QwenImageEditPipeline")(pipe, height=height // 32 * 32, width=width)
    width_to_edit, height_to_edit = policy.condition_size
    assert 0.9 < width_to_edit * height_to_edit / 2**20 < 1.1
    # Each side is rounded by up to 16 pixels, at most twice, and the shorter one has about 500.
    assert width_to_edit / height_to_edit == pytest.approx(policy.width / policy.height, rel=0.1)
    module = inspect.getmodule(type(pipe))
    assert module.calculate_dimensions(2**20, width_to_edit / height_to_edit)[:2] == policy.condition_size
