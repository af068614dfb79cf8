"""Each family does what its stock pipeline does, and trains: the proof that a policy's file is right."""

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers import PROMPTS, SMALL, assert_same, assert_the_ratio_is_one, logged, make_trainer, redness, trained
from miniatures import MINIATURES, build_flux_schnell
from peft import LoraConfig

from diffusers_mixgrpo import (
    MixedODESDEScheduler,
    MixGRPOConfig,
    MixGRPOTrainer,
    hybrid_inference,
    policy_class,
    sample_trajectories,
)
from diffusers_mixgrpo.policies import FAMILIES, PipelinePolicy
from diffusers_mixgrpo.policies.lora_targets import check_targets


TEXTS = ["a cat", "two big dogs"]  # of different lengths
SEEDS = [11, 12]
SIZE = {"height": 32, "width": 48}
STEPS = 5
# Guidance scales without and with a second pass. These families never have one.
DISTILLED = ("flux", "flux2", "flux-schnell")
SCALES = {"flux": (0.0, 3.5), "flux2": (1.0, 4.0), "flux2-klein": (1.0, 4.0), "qwen-image": (1.0, 4.0)}
SCALES |= {"stable-diffusion-3": (1.0, 7.0), "z-image": (0.0, 5.0)}
CASES = [(name, scale) for name, scales in SCALES.items() for scale in scales] + [("flux-schnell", 0.0)]
FAMILY = pytest.mark.parametrize("family", MINIATURES)
# Runs of FLUX.1 are what many other tests are about. Of the others one is enough as a rule.
ONE_FAMILY = pytest.mark.parametrize(
    "family", ["z-image", *(pytest.param(name, marks=pytest.mark.slow) for name in MINIATURES if name != "z-image")]
)


@functools.cache
def shared(family: str) -> DiffusionPipeline:
    """The miniature pipeline of a family; tests must leave it as it is."""
    return (MINIATURES | {"flux-schnell": build_flux_schnell})[family]()


def copied(family: str) -> DiffusionPipeline:
    pipe = shared(family)
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    own = type(pipe)(**parts)
    own.set_progress_bar_config(disable=True)
    return own


def make_policy(pipe, scale, texts=TEXTS, length=None) -> PipelinePolicy:
    """With texts padded to the longest of them, as the stock pipelines do that pad to the longest of a call."""
    policy = policy_class(type(pipe).__name__)
    if length is None:
        length = 24
        if policy.family == "qwen-image":
            length = pipe.encode_prompt(texts)[0].shape[1]
    return policy(pipe, **SIZE, num_inference_steps=STEPS, guidance_scale=scale, max_sequence_length=length)


def stock(policy, texts, output_type="pil", **arguments):
    """The output of the stock pipeline's `__call__`."""
    arguments = policy.call_arguments | arguments
    if "negative_prompt" in arguments and policy.family in ("qwen-image", "z-image"):  # which repeat no text
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(texts)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(texts)]]
    return policy.pipe(prompt=list(texts), generator=generators, output_type=output_type, **arguments).images


def roll_out(policy, texts=TEXTS, group=1, start=0, size=0, **config):
    scheduler = MixedODESDEScheduler.from_config(
        policy.pipe.scheduler.config, window_start=start, window_size=size, **config
    )
    return sample_trajectories(
        policy,
        scheduler,
        policy.encode(texts),
        policy.initial_latents(SEEDS[: len(texts)]),
        num_generations=group,
        generator=torch.Generator().manual_seed(0),
    )


# ---- Rollouts ----


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "two"])
@pytest.mark.parametrize("family, scale", CASES)
def test_a_rollout_without_a_window_is_the_stock_pipeline(family, scale, texts):
    policy = make_policy(shared(family), scale, texts)
    assert policy.is_guided == (family not in DISTILLED and scale == SCALES[family][1])
    trajectory = roll_out(policy, texts)
    latents = stock(policy, texts, "latent")
    if latents.shape == trajectory.latents.shape:  # not where the pipeline returns them unpacked
        assert torch.equal(trajectory.latents, latents)
    images = stock(policy, texts)
    assert len(images) == len(texts) and np.asarray(images[0]).std() > 5
    for ours, theirs in zip(policy.decode(trajectory.latents), images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("family, scale", CASES)
def test_the_shared_prefix_is_the_stock_pipelines(family, scale):
    policy = make_policy(shared(family), scale)
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    stock(policy, TEXTS, "latent", callback_on_step_end=keep)
    trajectory = roll_out(policy, group=3, start=2, size=2)
    assert trajectory.states.shape == (6, 3, *policy.latent_shape)
    assert torch.equal(trajectory.states[:, 0], states[1].repeat_interleave(3, 0))


@pytest.mark.parametrize("places", [{"start": 0}, {"start": 2}, {"start": 1, "suffix_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
@FAMILY
def test_the_ratio_is_one_before_the_first_update(family, sde_type, places):
    policy = make_policy(shared(family), SCALES[family][1], length=30)
    trajectory = roll_out(policy, group=2, size=2, sde_type=sde_type, **places)
    assert_the_ratio_is_one(policy, trajectory)


@FAMILY
def test_a_prompt_is_the_same_in_each_batch(family):
    policy = make_policy(shared(family), SCALES[family][1], length=30)
    together = policy.encode(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = policy.encode([text])
        for name, rows in together.rows.items():
            torch.testing.assert_close(rows[i : i + 1], alone.rows[name], rtol=1e-5, atol=1e-5)
        for name, tensor in together.shared.items():
            assert torch.equal(tensor, alone.shared[name])


# ---- Guidance ----


@pytest.mark.parametrize("family", [name for name in MINIATURES if name not in DISTILLED])
@torch.no_grad()
def test_guidance_is_a_second_pass_only_where_it_is_on(family):
    pipe = shared(family)
    images = []  # of each pass
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: images.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        for scale in SCALES[family]:
            policy = make_policy(pipe, scale)
            images.clear()
            policy.velocity(policy.initial_latents(SEEDS), torch.tensor(700.0), policy.encode(TEXTS))
            assert sum(images) == 2 * policy.passes_per_step
            assert policy.passes_per_step == (2 if policy.is_guided else 1)
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["flux2-klein", "stable-diffusion-3", "z-image"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.5])
def test_guidance_is_on_where_the_stock_pipeline_says_so(family, scale):
    pipe = shared(family)
    pipe._guidance_scale = scale  # as in its `__call__`
    assert make_policy(pipe, scale).is_guided == pipe.do_classifier_free_guidance


@pytest.mark.parametrize("family", ["qwen-image", "stable-diffusion-3", "z-image"])
@torch.no_grad()
def test_a_negative_prompt(family):
    policy = make_policy(shared(family), SCALES[family][1])
    other = type(policy)(
        policy.pipe, **SIZE, guidance_scale=policy.guidance_scale, max_sequence_length=24, negative_prompt="ugly red"
    )
    latents = policy.initial_latents(SEEDS)
    velocities = [each.velocity(latents, torch.tensor(700.0), each.encode(TEXTS)) for each in (policy, other)]
    assert not torch.allclose(*velocities)
    assert other.call_arguments["negative_prompt"] == "ugly red"
    assert other.with_sampling(height=48).negative_prompt == "ugly red"


@pytest.mark.parametrize("family", ["flux", "flux2", "flux2-klein"])
def test_pipelines_without_a_negative_prompt_refuse_one(family):
    pipe = shared(family)
    with pytest.raises(ValueError, match=f"`negative_prompt` must be None for a {type(pipe).__name__}, .*got 'ugly'"):
        policy_class(type(pipe).__name__)(pipe, negative_prompt="ugly")


def test_the_steps_of_flux_schnell_are_even_and_train(tmp_path):
    """Without a shift, and with what its card says: four steps, no guidance."""
    pipe = build_flux_schnell()
    changes = {"num_inference_steps": 4, "window_size": 1, "sde_type": "cps", "guidance_scale": 0.0, "max_steps": 2}
    trainer = make_trainer(tmp_path, pipe=pipe, **changes)
    trainer.train()
    assert trainer.rollout.trajectory.transitions.timesteps.tolist() == [1000]
    policy = trainer.engine.policy
    policy.prepare_scheduler(trainer.engine.scheduler)
    assert trainer.engine.scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) <= 1e-5


def test_a_distilled_klein_is_not_guided():
    pipe = MINIATURES["flux2-klein"](is_distilled=True)
    policy = make_policy(pipe, 4.0)
    assert not policy.is_guided
    assert "negative_prompt_embeds" not in policy.encode(TEXTS).rows
    for ours, theirs in zip(policy.decode(roll_out(policy).latents), stock(policy, TEXTS), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_sd3_without_its_t5_encoder():
    parts = dict(shared("stable-diffusion-3").components)
    pipe = type(shared("stable-diffusion-3"))(**parts | {"text_encoder_3": None, "tokenizer_3": None})
    pipe.set_progress_bar_config(disable=True)
    policy = make_policy(pipe, 7.0)
    assert torch.equal(roll_out(policy).latents, stock(policy, TEXTS, "latent"))


@pytest.mark.parametrize("family", ["stable-diffusion-3", "z-image"])
def test_a_dynamic_shift_where_the_published_models_have_none(family):
    pipe = copied(family)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    policy = make_policy(pipe, SCALES[family][0])
    assert torch.equal(roll_out(policy).latents, stock(policy, TEXTS, "latent"))


# ---- Training ----


def trainer_of(family, output_dir, scale=None, **changes):
    scale = SCALES[family][1] if scale is None else scale
    settings = {"pipe": copied(family), "guidance_scale": scale, "max_sequence_length": 30, "eval_dataset": PROMPTS}
    return make_trainer(output_dir, **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoraConfig(r=4, lora_alpha=64), False], ids=["lora", "full"])
@FAMILY
def test_training_raises_a_reward(family, lora, tmp_path):
    settings = {"learning_rate": 2e-2 if lora else 5e-3, "max_steps": 24, "per_device_train_batch_size": 8}
    trainer = trainer_of(family, tmp_path, lora=lora, num_generations=8, logging_steps=24, **settings)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before["eval_reward"] + before["eval_rewards/redness/std"]


@FAMILY
def test_the_saved_lora_gives_the_trainers_images_in_the_stock_pipeline(family, tmp_path):
    trainer = trainer_of(family, tmp_path, lora=LoraConfig(r=4, lora_alpha=256), max_steps=4, learning_rate=5e-2)
    trainer.train()
    trainer.save_model()
    images = trainer.sample_images([TEXTS[1]], [3])
    pipe = copied(family)
    arguments = trainer.evaluator.policy.call_arguments

    def sample():
        return pipe(prompt=TEXTS[1], generator=torch.Generator().manual_seed(3), **arguments).images[0]

    untrained = np.asarray(sample(), dtype=int)
    pipe.load_lora_weights(str(tmp_path))
    difference = np.asarray(sample(), dtype=int) - np.asarray(images[0], dtype=int)
    assert np.abs(difference).max() <= 1
    assert np.abs(untrained - np.asarray(images[0], dtype=int)).max() > 5


@ONE_FAMILY
def test_a_resumed_run_is_the_uninterrupted_one(family, tmp_path):
    whole = trainer_of(family, tmp_path / "whole", max_steps=4)
    whole.train()
    first = trainer_of(family, tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    second = trainer_of(family, tmp_path / "parts", max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same(trained(second), trained(whole))


@ONE_FAMILY
def test_the_options_of_a_run(family, tmp_path):
    """The preflight, cached embeddings, hybrid inference, gradient checkpointing, bfloat16, the VAE off the device."""
    options = {"gradient_checkpointing": True, "bf16": True, "offload_vae": True, "cache_prompt_embeds": True}
    trainer = trainer_of(family, tmp_path, max_steps=2, **options)
    report = trainer.preflight()
    passes = trainer.engine.policy.passes_per_step
    assert report.nfe_per_image == passes * 5 and "ratio" in str(report)
    trainer.train()
    assert trainer.state.log_history[0]["nfe"] == passes * 5
    trained_images = trainer.sample_images([TEXTS[0]], [3])
    with hybrid_inference(trainer.pipe, trained_ratio=0):
        base_images = trainer.sample_images([TEXTS[0]], [3])
    untrained = trainer_of(family, tmp_path / "untrained", bf16=True, cache_prompt_embeds=True)
    expected = untrained.sample_images([TEXTS[0]], [3])
    assert np.array_equal(np.asarray(base_images[0]), np.asarray(expected[0]))
    assert not np.array_equal(np.asarray(trained_images[0]), np.asarray(expected[0]))


# ---- What a family declares ----


@FAMILY
def test_lora_targets_exist(family):
    """Each of them names layers of the transformer, of the miniature and of one in full size."""
    targets = list(policy_class(type(shared(family)).__name__).lora_target_modules)
    with torch.device("meta"):
        full_size = type(shared(family).transformer)()
    for transformer in (shared(family).transformer, full_size):
        check_targets(transformer, LoraConfig(target_modules=targets), [])
        with pytest.raises(ValueError, match="got 'attn.to_nothing', which no layer has"):
            check_targets(transformer, LoraConfig(target_modules=[*targets, "attn.to_nothing"]), [])
    copied(family).transformer.add_adapter(LoraConfig(target_modules=targets))


@FAMILY
def test_defaults_are_those_of_the_pipelines_call(family):
    pipe = shared(family)
    policy = policy_class(type(pipe).__name__)
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}
    assert policy.default_guidance_scale == defaults[policy.guidance_argument]
    assert policy.default_sequence_length == defaults["max_sequence_length"]
    assert ("negative_prompt" in defaults) == (policy.default_negative_prompt is not None) or family == "flux"


@FAMILY
def test_the_licenses_of_base_models_are_their_own(family):
    for repository, entries in policy_class(type(shared(family)).__name__).licenses.items():
        if entries["license"] == "other":  # the Hub then wants a name and a link
            assert entries.keys() == {"license", "license_name", "license_link"}
            assert entries["license_link"].startswith(f"https://huggingface.co/{repository}/blob/main/LICENSE")
        else:
            assert entries == {"license": "apache-2.0"}


@FAMILY
def test_a_preset_leaves_shift_and_guidance_to_the_family(family, tmp_path):
    """Those of the presets are for the papers' model, FLUX.1."""
    settings = MixGRPOConfig.from_preset("mixgrpo", output_dir=str(tmp_path), **SMALL)
    trainer = MixGRPOTrainer(copied(family), redness, settings, PROMPTS, peft_config=LoraConfig(r=4))
    policy, scheduler = trainer.engine.policy, trainer.engine.scheduler
    assert (settings.shift, settings.guidance_scale) == (3.0, 3.5)
    assert trainer.args.sde_type == "flow" and trainer.args.epsilon == SMALL["epsilon"]
    if family == "flux":
        assert trainer.args is settings and policy.guidance_scale == 3.5
        assert scheduler.config.shift == 3.0 and not scheduler.config.use_dynamic_shifting
    else:
        assert policy.guidance_scale == policy.default_guidance_scale
        for name in ("shift", "use_dynamic_shifting"):
            assert scheduler.config[name] == policy.pipe.scheduler.config[name]


def test_every_family_is_tested():
    tested = {type(shared(family)).__name__ for family in MINIATURES}
    others = {name for name in FAMILIES if policy_class(name).takes_image}  # see test_editing.py
    assert tested == set(FAMILIES) - others
