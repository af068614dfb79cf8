"""FluxPolicy does what FluxPipeline.__call__ does, step by step and as a whole rollout."""

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from helpers import build_pipeline

from diffusers_mixgrpo import MixedODESDEScheduler, policy_class, sample_trajectories
from diffusers_mixgrpo.core.transitions import SDE_TYPES
from diffusers_mixgrpo.policies.flux import FluxPolicy


PROMPTS = ["a cat", "two red dogs", "sea"]


@pytest.fixture
def policy(shared_pipe) -> FluxPolicy:
    return FluxPolicy(shared_pipe, height=32, width=32, num_inference_steps=4, max_sequence_length=12)


@torch.no_grad()
def test_encode_is_the_pipelines(policy):
    conditioning = policy.encode(PROMPTS)
    embeds, pooled, ids = policy.pipe.encode_prompt(PROMPTS, None, max_sequence_length=12)
    assert len(conditioning) == 3
    assert torch.equal(conditioning.rows["prompt_embeds"], embeds)
    assert torch.equal(conditioning.rows["pooled_prompt_embeds"], pooled)
    assert torch.equal(conditioning.shared["text_ids"], ids)
    assert conditioning.rows["prompt_embeds"].shape[1] == 12


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
    conditioning = policy.encode(PROMPTS)
    latents = policy.initial_latents([1, 2, 3])
    timesteps = torch.tensor([1000.0, 512.34, 7.5])
    together = policy.velocity(latents, timesteps, conditioning)
    for i in range(3):
        alone = policy.velocity(latents[i : i + 1], timesteps[i], conditioning[i : i + 1])
        assert (together[i : i + 1] - alone).abs().max() <= 1e-5 * alone.abs().max()
    flipped = policy.velocity(latents, timesteps.flip(0), conditioning)
    assert (flipped - together).abs().max() > 1e-3 * together.abs().max()


@torch.no_grad()
def test_velocity_calls_the_given_module(policy):
    class Doubled(torch.nn.Module):
        def forward(self, **kwargs):
            return (2 * policy.pipe.transformer(**kwargs)[0],)

    conditioning = policy.encode(PROMPTS[:1])
    latents = policy.initial_latents([1])
    time = torch.tensor(700.0)
    own = policy.velocity(latents, time, conditioning)
    given = policy.velocity(latents, time, conditioning, Doubled())
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
    conditioning = weak.encode(["a"])
    latents = weak.initial_latents([0])
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
    for target in FluxPolicy.lora_target_modules:
        assert any(name.endswith(target) for name in names), target


@pytest.mark.parametrize("size, legal", [(30, "28 or 32"), (3, "4 or 8"), (0, "4 or 8"), (-4, "4 or 8")])
def test_sizes_that_cannot_be_packed(shared_pipe, size, legal):
    with pytest.raises(ValueError, match=f"`width` must be a positive multiple of 4 .*got {size}. Use {legal}"):
        FluxPolicy(shared_pipe, height=32, width=size)


def test_other_arguments_out_of_range(shared_pipe):
    with pytest.raises(ValueError, match="`num_inference_steps` must be 1 or more, got 0"):
        FluxPolicy(shared_pipe, 32, 32, num_inference_steps=0)
    with pytest.raises(ValueError, match=r"`max_sequence_length` must be in \[1, 512\], got 513"):
        FluxPolicy(shared_pipe, 32, 32, max_sequence_length=513)


def test_not_a_flow_velocity(tiny_pipe):
    tiny_pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler` must be one of flow matching, got .*prediction_type='epsilon'"):
        FluxPolicy(tiny_pipe, 32, 32)


def test_another_kind_of_pipeline():
    with pytest.raises(TypeError, match="`pipe` must be a FluxPipeline, got type"):
        FluxPolicy(DiTPipeline, 32, 32)


def test_the_policy_of_a_pipeline(shared_pipe):
    assert policy_class("FluxPipeline") is FluxPolicy
    with pytest.raises(TypeError, match=r"`model` must be .*pipelines \(FluxPipeline, .*\), got DiTPipeline"):
        policy_class("DiTPipeline")
    policy = FluxPolicy(shared_pipe, max_sequence_length=12)
    assert (policy.height, policy.width) == (256, 256)  # the pipeline's default: 128 latents, 2x up
    assert set(policy.text_encoders) == {"text_encoder", "text_encoder_2"}
    assert set(policy.tokenizers) == {"tokenizer", "tokenizer_2"}
    assert policy.transformer is shared_pipe.transformer


def test_the_same_policy_with_another_number_of_steps(policy):
    fewer = policy.with_sampling(num_inference_steps=2)
    assert fewer.call_arguments == policy.call_arguments | {"num_inference_steps": 2}
    assert policy.num_inference_steps == 4
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(policy.pipe.scheduler.config)
    fewer.prepare_scheduler(scheduler)
    assert len(scheduler.timesteps) == 2


def test_the_same_policy_at_another_size(policy, shared_pipe):
    policy.velocity(
        policy.initial_latents([0]), torch.tensor(500.0), policy.encode(["a cat"])
    )  # keeps token positions
    larger = policy.with_sampling(height=64, width=48)
    assert larger.call_arguments == policy.call_arguments | {"height": 64, "width": 48}
    assert larger.latent_shape == (64 * 48 // 16, 16) and policy.latent_shape == (64, 16)
    latents = larger.initial_latents([0])
    velocity = larger.velocity(latents, torch.tensor(500.0), larger.encode(["a cat"]))
    expected = FluxPolicy(shared_pipe, **larger.call_arguments).velocity(
        latents, torch.tensor(500.0), larger.encode(["a cat"])
    )
    assert torch.equal(velocity, expected)
    with pytest.raises(ValueError, match="`width` must be a positive multiple of 4 pixels, got 50. Use 48 or 52."):
        policy.with_sampling(width=50)


# ---- Rollouts ----


def rollout(pipe, size, group=1, dtype=None, **config):
    policy = FluxPolicy(pipe, height=32, width=32, num_inference_steps=6, max_sequence_length=12)
    scheduler = MixedODESDEScheduler.from_config(
        pipe.scheduler.config, window_start=2 if size else 0, window_size=size, **config
    )
    latents = policy.initial_latents([11, 12])
    trajectory = sample_trajectories(
        policy,
        scheduler,
        policy.encode(PROMPTS[:2]),
        latents if dtype is None else latents.to(dtype),
        num_generations=group,
        generator=torch.Generator().manual_seed(0),
    )
    return policy, trajectory


@pytest.mark.parametrize("dynamic, guidance_embeds", [(True, True), (False, True), (True, False)])
def test_a_rollout_without_a_window_is_the_stock_pipeline(dynamic, guidance_embeds):
    pipe = build_pipeline(dynamic_shift=dynamic, guidance_embeds=guidance_embeds)
    policy, trajectory = rollout(pipe, size=0)
    latents, images = (
        pipe(
            PROMPTS[:2],
            generator=[torch.Generator().manual_seed(seed) for seed in (11, 12)],
            output_type=output_type,
            **policy.call_arguments,
        ).images
        for output_type in ("latent", "pil")
    )
    assert torch.equal(trajectory.latents, latents)
    for ours, stock in zip(policy.decode(trajectory.latents), images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(stock))


def ratio_deviation(policy, trajectory, size=5):
    """The largest |ratio - 1| of replays of `size` transitions at once."""
    images, steps = trajectory.transition_indices()
    deviations = []
    for part in torch.arange(len(images)).split(size):
        with torch.no_grad():
            replay = trajectory.replay(policy, images[part], steps[part])
        old = trajectory.log_probs[images[part], steps[part]]
        deviations.append((torch.exp(replay.log_probs - old) - 1).abs().max().item())
    return max(deviations)


@pytest.mark.parametrize("sde_type", SDE_TYPES)
def test_the_ratio_is_one_before_the_first_update(shared_pipe, sde_type):
    policy, trajectory = rollout(shared_pipe, size=3, group=4, sde_type=sde_type)
    assert trajectory.states.shape == (8, 4, *policy.latent_shape)
    assert ratio_deviation(policy, trajectory) <= 1e-5


def test_the_ratio_in_bfloat16():
    # The network rounds to 8 bits. With states in float32 the mean over 1024 latent elements stays close to 0.
    policy, trajectory = rollout(build_pipeline().to(torch.bfloat16), size=3, group=4, dtype=torch.float32)
    assert trajectory.states.dtype == torch.float32
    assert ratio_deviation(policy, trajectory) <= 5e-3
