"""FluxPolicy does what FluxPipeline.__call__ does."""

import numpy as np
import pytest
import torch
from conftest import build_pipeline
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from diffusers_mixgrpo import FluxPolicy
from diffusers_mixgrpo.policies import FLUX_LORA_TARGET_MODULES, load_flux_pipeline


PROMPTS = ["a cat", "two red dogs", "sea"]


@pytest.fixture
def policy(shared_pipe) -> FluxPolicy:
    return FluxPolicy(shared_pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=12)


@torch.no_grad()
def test_encode_is_the_pipelines(policy):
    conditioning = policy.encode(PROMPTS)
    embeds, pooled, ids = policy.pipe.encode_prompt(PROMPTS, None, max_sequence_length=12)
    assert len(conditioning) == 3
    torch.testing.assert_close(conditioning.prompt_embeds, embeds, rtol=0, atol=0)
    torch.testing.assert_close(conditioning.pooled_prompt_embeds, pooled, rtol=0, atol=0)
    torch.testing.assert_close(conditioning.text_ids, ids, rtol=0, atol=0)
    assert conditioning.prompt_embeds.shape[1] == 12


def test_conditioning_selects_repeats_and_moves(policy):
    conditioning = policy.encode(PROMPTS)
    repeated = conditioning.repeat_interleave(2)
    assert len(repeated) == 6
    for row, source in enumerate([0, 0, 1, 1, 2, 2]):
        assert torch.equal(repeated.prompt_embeds[row], conditioning.prompt_embeds[source])
        assert torch.equal(repeated.pooled_prompt_embeds[row], conditioning.pooled_prompt_embeds[source])
    picked = conditioning[torch.tensor([2, 0])]
    assert torch.equal(picked.prompt_embeds, conditioning.prompt_embeds[[2, 0]])
    assert torch.equal(picked.text_ids, conditioning.text_ids)
    assert conditioning.to(torch.float64).pooled_prompt_embeds.dtype == torch.float64


def test_initial_latents_are_the_pipelines(policy):
    pipe = policy.pipe
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected, _ = pipe.prepare_latents(2, 4, 32, 32, torch.float32, torch.device("cpu"), generators)
    latents = policy.initial_latents([5, 6])
    assert latents.shape == (2, *policy.latent_shape)
    assert torch.equal(latents, expected)
    assert torch.equal(policy.initial_latents([torch.Generator().manual_seed(6)])[0], expected[1])


@pytest.mark.parametrize("dynamic", [True, False])
def test_schedule_is_the_pipelines(dynamic):
    pipe = build_pipeline(dynamic_shift=dynamic)
    policy = FluxPolicy(pipe, height=32, width=48, num_inference_steps=5, max_sequence_length=12)
    pipe("a", height=32, width=48, num_inference_steps=5, max_sequence_length=12, output_type="latent")
    expected = pipe.scheduler.sigmas
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    policy.prepare_scheduler(scheduler)
    assert torch.equal(scheduler.sigmas, expected)
    assert scheduler.begin_index == 0
    if dynamic:  # not merely equal to each other: the shift of 96 image tokens
        mu = calculate_shift(policy.latent_shape[0])
        first = np.exp(mu) / (np.exp(mu) + (1 / 0.8 - 1))
        assert scheduler.sigmas[1].item() == pytest.approx(first, rel=1e-5)


@torch.no_grad()
def test_velocity_with_a_timestep_per_image(policy):
    conditioning, latents = policy.encode(PROMPTS), policy.initial_latents([1, 2, 3])
    timesteps = torch.tensor([1000.0, 512.34, 7.5])
    together = policy.velocity(latents, timesteps, conditioning)
    for i in range(3):
        alone = policy.velocity(latents[i : i + 1], timesteps[i], conditioning[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(policy.velocity(latents, timesteps.flip(0), conditioning), together, atol=1e-3)


@torch.no_grad()
def test_velocity_calls_the_given_module(policy):
    class Doubled(torch.nn.Module):
        def forward(self, **kwargs):
            return (2 * policy.pipe.transformer(**kwargs)[0],)

    conditioning, latents = policy.encode(PROMPTS[:1]), policy.initial_latents([1])
    time = torch.tensor(700.0)
    own, given = (policy.velocity(latents, time, conditioning, t) for t in (None, Doubled()))
    assert torch.equal(given, 2 * own)


@torch.no_grad()
def test_velocity_comes_in_the_dtype_of_the_latents():
    policy = FluxPolicy(build_pipeline().to(torch.bfloat16), height=32, width=32, max_sequence_length=12)
    conditioning = policy.encode(PROMPTS[:1])
    latents = policy.initial_latents([1])
    assert latents.dtype == torch.bfloat16
    time = torch.tensor(700.0)
    velocity = policy.velocity(latents.float(), time, conditioning)
    assert velocity.dtype == torch.float32
    assert torch.equal(velocity.bfloat16(), policy.velocity(latents, time, conditioning))


@pytest.mark.parametrize("guidance_embeds", [True, False])
@torch.no_grad()
def test_guidance(guidance_embeds):
    pipe = build_pipeline(guidance_embeds=guidance_embeds)
    weak, strong = (FluxPolicy(pipe, 32, 32, guidance_scale=scale, max_sequence_length=12) for scale in (1.0, 8.0))
    conditioning, latents = weak.encode(["a"]), weak.initial_latents([0])
    same = torch.equal(*(p.velocity(latents, torch.tensor(500.0), conditioning) for p in (weak, strong)))
    assert same != guidance_embeds


def test_decode_in_batches_is_the_pipelines(policy):
    pipe, kwargs = policy.pipe, {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 12}
    outputs = []
    for output_type in ("latent", "pil"):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        outputs.append(pipe(PROMPTS, generator=generators, output_type=output_type, **kwargs).images)
    latents, images = outputs
    for batch_size in (None, 2, 1):
        decoded = policy.decode(latents, batch_size)
        assert len(decoded) == 3
        for ours, stock in zip(decoded, images, strict=True):
            difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(stock, dtype=int)).max()
            assert difference <= (0 if batch_size is None else 1)  # batches may round differently


def test_lora_targets_exist(shared_pipe):
    names = [name for name, _ in shared_pipe.transformer.named_modules()]
    for target in FLUX_LORA_TARGET_MODULES:
        assert any(name.endswith(target) for name in names), target


@pytest.mark.parametrize("size, legal", [(30, "28 or 32"), (3, "4 or 8"), (0, "4 or 8"), (-4, "4 or 8")])
def test_sizes_that_cannot_be_packed(shared_pipe, size, legal):
    with pytest.raises(ValueError, match=f"`width` must be a positive multiple of 4 .*got {size}. Use {legal}"):
        FluxPolicy(shared_pipe, height=32, width=size)


def test_other_arguments_out_of_range(shared_pipe):
    with pytest.raises(ValueError, match="`num_inference_steps` must be 1 or more, got 0"):
        FluxPolicy(shared_pipe, 32, 32, num_inference_steps=0)
    with pytest.raises(ValueError, match="`max_sequence_length` must be from 1 to 512"):
        FluxPolicy(shared_pipe, 32, 32, max_sequence_length=513)


def test_not_a_flow_velocity(tiny_pipe):
    tiny_pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"`pipe.scheduler` is a EulerDiscreteScheduler .*'epsilon'.*FlowMatchEuler"):
        FluxPolicy(tiny_pipe, 32, 32)


def test_another_kind_of_pipeline():
    with pytest.raises(TypeError, match="must be a diffusers FluxPipeline, got type"):
        FluxPolicy(StableDiffusionPipeline, 32, 32)


def test_load(pipeline_folder, shared_pipe):
    pipe = load_flux_pipeline(pipeline_folder)
    for key, value in shared_pipe.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[key], value)


@pytest.mark.parametrize(
    "path, problem",
    [
        ("./no/such/folder", "there is no such folder"),
        ("nowhere", "there is no such folder"),
        ("someone/something-that-is-not-there", "could not be loaded"),
    ],
)
def test_load_from_a_missing_path(path, problem):
    with pytest.raises(FileNotFoundError, match=problem) as caught:
        load_flux_pipeline(path)
    assert path in str(caught.value)


def test_load_from_another_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="without a model_index.json"):
        load_flux_pipeline(tmp_path)
