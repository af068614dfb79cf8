"""One iteration from its plan to the gradient, by an engine that no trainer has made."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import PROMPTS, SMALL, assert_same, build_pipeline, make_trainer, redness, small_config
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback, set_seed

from diffusers_mixgrpo import Engine, RewardError, policy_class
from diffusers_mixgrpo.policies.preparation import prepare_pipeline
from diffusers_mixgrpo.rewards.runner import RewardRunner
from diffusers_mixgrpo.training.engine import make_scheduler
from diffusers_mixgrpo.training.evaluation import Evaluator


ROWS = PROMPTS[:2]
WHOLE = {"per_device_train_batch_size": 8, "steps_per_generation": 1}  # one training batch per iteration


def make_engine(output_dir, pipe=None, rewards=redness, lora=True, **changes) -> Engine:
    """An engine of a new miniature pipeline, or of `pipe`. A LoRA starts with random weights: each has a gradient."""
    settings = small_config(output_dir, **changes)
    pipe = build_pipeline() if pipe is None else pipe
    sampling = ("height", "width", "num_inference_steps", "max_sequence_length")
    policy = policy_class(type(pipe).__name__)(pipe, **{name: getattr(settings, name) for name in sampling})
    scheduler = make_scheduler(pipe.scheduler, settings)
    set_seed(settings.seed)
    weights = prepare_pipeline(policy, random_lora() if lora else None, settings)
    rewards = rewards if isinstance(rewards, list) else [rewards]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if settings.bf16 else "no")
    return Engine(policy, scheduler, settings, RewardRunner(rewards), accelerator, weights)


def random_lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)


@pytest.fixture
def make(tmp_path) -> Callable[..., Engine]:
    return lambda **kwargs: make_engine(tmp_path, **kwargs)


def roll_out(engine, iteration=0, rows=ROWS):
    return engine.roll_out(engine.plan(iteration, rows))


def gradients(engine) -> dict[str, torch.Tensor]:
    """Those of the trained weights, which have none afterwards."""
    trained = {name: p for name, p in engine.policy.transformer.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    engine.policy.transformer.zero_grad()
    return found


def assert_close(first, second, share=1e-4):
    """
    The same tensors up to a share of the largest element of all.

    float32 has 6e-8 of a number, and sums over up to 64 tokens, 8 images and two layers are taken in another order.
    """
    assert first.keys() == second.keys() and first
    scale = max(float(value.abs().max()) for value in second.values())
    assert scale > 0
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= share * scale, name


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


# ---- An iteration ----


def test_an_iteration_without_a_trainer(make, capfd, caplog):
    engine = make(learning_rate=5e-2, step_weighting="none")
    optimizer = torch.optim.AdamW(engine.trained_parameters, lr=engine.settings.learning_rate)
    plan = engine.plan(0, ROWS)
    assert plan.prompts == ["a cat", "two dogs"] and plan.window == (0, 2)
    rollout = engine.roll_out(plan)

    assert len(rollout.images) == len(rollout.trajectory) == 8 and rollout.rewards.shape == (1, 8)
    assert [row["prompt"] for row in rollout.rows] == ["a cat"] * 4 + ["two dogs"] * 4
    assert rollout.rewards[0].tolist() == redness([], rollout.images)
    assert rollout.statistics["reward"] == pytest.approx(float(rollout.rewards.mean()))
    assert rollout.statistics["reward_std"] == pytest.approx(float(rollout.rewards.view(2, 4).std(1).mean()))
    assert rollout.statistics["rewards/redness/failed"] == rollout.statistics["frac_reward_zero_std"] == 0
    assert rollout.statistics["window/start"] == rollout.statistics["iteration"] == 0
    assert rollout.statistics["nfe"] == rollout.statistics["nfe_amortized"] == 5
    assert rollout.advantages.view(2, 4).mean(1).abs().max() < 1e-6
    assert rollout.reference_means is None
    batches = rollout.training_batches(4)
    assert sorted(torch.cat(batches).tolist()) == list(range(8)) and len(batches) == 2

    ratios = []
    for images in batches:
        batch = engine.backward(rollout, images)
        (only,) = batch.passes
        # Before the first update the loss is minus the mean advantage, each of its transitions having the ratio 1.
        ratios.append(only.ratio)
        if len(ratios) == 1:
            assert batch.loss.item() == pytest.approx(-rollout.advantages[images].mean().item(), abs=1e-3)
        optimizer.step()
        optimizer.zero_grad()
    assert (ratios[0] - 1).abs().max() < 1e-4
    assert (ratios[1] - 1).abs().max() > 1e-3
    seconds = engine.timer.pop()
    assert set(seconds) == {"sampling", "decoding", "reward", "training"} and min(seconds.values()) >= 0
    # It returns values and logs nothing.
    shown = capfd.readouterr()
    assert shown.out == shown.err == "" and not caplog.records


@pytest.mark.parametrize("kwargs", [{}, {"lora": False, "beta": 0.1, "window_train_fraction": 0.5}])
def test_the_gradient_is_the_trainers(make, tmp_path, kwargs):
    """The same passes of the same shapes: bit for bit."""
    found = {}

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            found.update({name: p.grad.clone() for name, p in trained.items()})

    kwargs = WHOLE | {"lora": True, "max_grad_norm": 0.0} | kwargs
    lora = random_lora() if kwargs["lora"] else False
    trainer = make_trainer(tmp_path, callbacks=[Note()], **(kwargs | {"lora": lora, "max_steps": 1}))
    trainer.train()

    engine = make(**kwargs)
    rollout = roll_out(engine, rows=trainer.rollout.plan.rows)
    assert torch.equal(rollout.trajectory.states, trainer.rollout.trajectory.states)
    assert torch.equal(rollout.advantages, trainer.rollout.advantages)
    engine.backward(rollout, rollout.training_batches(8)[0])
    assert_same(gradients(engine), found)


# ---- Sampling ----


def assert_same_rollout(first, second):
    assert torch.equal(first.trajectory.states, second.trajectory.states)
    assert torch.equal(first.trajectory.log_probs, second.trajectory.log_probs)
    assert torch.equal(first.trajectory.latents, second.trajectory.latents)
    assert np.array_equal(pixels(first.images), pixels(second.images))
    assert torch.equal(first.order, second.order)


def test_a_rollout_is_a_function_of_its_plan_and_the_weights(make):
    """Bit for bit: sampled twice, with other iterations in between, and by another engine."""
    engine = make(ode_solver="dpmsolver++", window_interval=2)
    first = roll_out(engine, 2)
    assert first.plan.window.start == 1
    assert_same_rollout(roll_out(engine, 2), first)
    other = roll_out(engine, 0)
    assert not torch.equal(other.trajectory.latents, first.trajectory.latents)
    torch.manual_seed(5)  # no random state takes part
    assert_same_rollout(roll_out(engine, 2), first)
    assert_same_rollout(roll_out(make(ode_solver="dpmsolver++", window_interval=2), 2), first)
    seeded = roll_out(make(ode_solver="dpmsolver++", window_interval=2, seed=7), 2)
    assert not torch.equal(seeded.trajectory.latents, first.trajectory.latents)


@pytest.mark.parametrize("shared_noise", [True, False])
def test_the_noise_does_not_depend_on_the_batch_size(make, shared_noise):
    engine = make(shared_noise=shared_noise)
    noises = []
    for size in (None, 3):  # a group of four in parts of three and one
        engine.settings.sample_batch_size = size
        trajectory = roll_out(engine).trajectory
        replay = trajectory.replay(engine.policy)
        recorded = trajectory.states[:, 1:].flatten(0, 1)
        noises.append(((recorded - replay.means) / replay.stds).detach())
        noises[-1] = torch.cat([noises[-1].flatten(), trajectory.states[:, 0].flatten()])
    assert noises[0].std() > 0.9
    # A state of 1 is rounded by 6e-8, and a std here is 0.1 or more; the rest is for passes of other shapes.
    assert (noises[0] - noises[1]).abs().max() < 1e-4 * noises[0].abs().max()


def test_prompts_share_their_noise_and_prefix_or_not(make):
    for shared in (True, False):
        rollout = roll_out(make(shared_noise=shared), 1)
        starts = rollout.trajectory.states[:, 0].unflatten(0, (2, 4))
        assert torch.equal(starts[:, :1].expand_as(starts), starts) == shared
        assert rollout.statistics["nfe_amortized"] == (1 / 4 if shared else 1) + 4


def test_a_static_shift(make):
    engine = make(shift=2.0)
    engine.policy.prepare_scheduler(engine.scheduler)
    assert engine.scheduler.sigmas[1].item() == pytest.approx(2 * 0.8 / (1 + 0.8), rel=1e-6)
    assert engine.policy.pipe.scheduler.config.use_dynamic_shifting  # the pipeline keeps its own


def test_a_plan_of_a_kept_graph_draws_the_same(make):
    plain = roll_out(make(**WHOLE)).trajectory
    kept = roll_out(make(**WHOLE, reuse_rollout_graph=True)).trajectory
    assert torch.equal(plain.states, kept.states) and torch.equal(plain.latents, kept.latents)
    assert torch.equal(plain.log_probs, kept.log_probs.detach())
    assert kept.log_probs.requires_grad and not kept.states.requires_grad


@pytest.mark.parametrize(
    "cache",
    [
        {"name": "FirstBlockCacheConfig", "threshold": 10.0},
        {"name": "TaylorSeerCacheConfig", "cache_interval": 3, "disable_cache_before_step": 1},
    ],
    ids=lambda cache: cache["name"],
)
def test_a_cache_is_used_outside_the_window_only(make, cache):
    kwargs = WHOLE | {"num_inference_steps": 9, "window_strategy": "frozen", "window_start": 3}
    engines = [make(**kwargs, ode_cache=ode_cache) for ode_cache in (None, cache)]
    plain, cached = (roll_out(engine) for engine in engines)
    assert not engines[1].policy.transformer.is_cache_enabled
    assert not torch.equal(cached.trajectory.states[:, 0], plain.trajectory.states[:, 0])  # the prefix is a shortcut
    # The window's transitions are the model's own: replayed without any cache, in the batch of the rollout, they have
    # the same log-probs bit for bit.
    for step in (0, 1):
        assert (engines[1].objective(cached, torch.arange(8), torch.full([8], step)).ratio == 1).all()
    # Evaluations do not use it either.
    images = [Evaluator(engine).sample_images(["a cat"], [0]) for engine in engines]
    assert np.array_equal(pixels(images[0]), pixels(images[1]))


def test_a_merged_lora_changes_nothing_but_rounding(make):
    plain, merged = (roll_out(make(merge_lora=merge), 1).trajectory for merge in (False, True))
    assert not torch.equal(plain.latents, merged.latents)
    assert (plain.latents - merged.latents).abs().max() < 1e-3 * plain.latents.abs().max()


def test_images_do_not_depend_on_decode_batches(make):
    engine = make()
    images = []
    for size in (None, 3):
        engine.settings.decode_batch_size = size
        images.append(pixels(roll_out(engine).images))
    assert np.abs(images[0] - images[1]).max() <= 1  # of 255


# ---- Scoring ----


def test_unscored_images_are_masked_and_counted(make):
    def half(prompts, images, **columns):
        return [None, math.nan, *redness(prompts, images)[2:]]

    rollout = roll_out(make(rewards=half))
    assert rollout.statistics["rewards/half/failed"] == 2
    assert (rollout.advantages == 0).tolist() == [True, True] + [False] * 6
    assert math.isfinite(rollout.statistics["reward"])


def test_a_reward_that_raises_for_one_image_costs_only_that_image(make):
    calls = []

    def moody(prompts, images, **columns):
        calls.append(len(images))
        if len(images) == 8 or calls[-2] == 8:  # the batch, and then its first image alone
            raise ConnectionError("try later")
        return redness(prompts, images)

    rollout = roll_out(make(rewards=moody))
    assert calls == [8] + [1] * 8
    assert rollout.statistics["rewards/moody/failed"] == 1
    assert (rollout.advantages == 0).tolist() == [True] + [False] * 7


def test_too_many_failures_are_an_error(make):
    def never(prompts, images, **columns):
        return [None] * len(images)

    with pytest.raises(RewardError, match="`never` could not score 100% of the 8 images of iteration 3.*=0.5"):
        roll_out(make(rewards=[redness, never]), 3)
    engine = make(rewards=[redness, never], max_reward_failure_rate=1.0, reward_weights=[1.0, 0.0])
    assert (roll_out(engine).advantages != 0).all()  # a reward of weight 0 is only logged


def test_rewards_are_tried_on_gray_images(make):
    def missing(prompts, images, **columns):
        return [0.0] * (len(images) - 1)

    def broken(prompts, images, **columns):
        raise KeyError("weights")

    seen = []

    def fine(prompts, images, **columns):
        seen.append((prompts, columns, {image.size for image in images}))
        return [None] * len(images)

    make(rewards=fine, width=64).try_rewards(ROWS[:1])
    assert seen == [(["a cat"] * 2, {"tag": [0, 0]}, {(64, 32)})]
    for reward, message in (
        (missing, "`missing` must return one score per image, got 1 scores for 2 images"),
        (broken, "`broken` failed on two gray images before training: KeyError"),
    ):
        with pytest.raises(RewardError, match=message):
            make(rewards=[redness, reward]).try_rewards(ROWS)


def test_async_rewards_start_while_the_next_prompt_is_sampled(make):
    events = []

    async def later(prompts, images, **columns):
        return redness(prompts, images)

    engine = make(rewards=[later, redness], sample_batch_size=4)
    decode, start = engine.policy.decode, engine.rewards.start
    engine.policy.decode = lambda *args: events.append("decoded") or decode(*args)
    engine.rewards.start = lambda *args: events.append("asked") or start(*args)
    rollout = roll_out(engine)
    assert events == ["decoded", "asked", "decoded", "asked"]
    assert torch.equal(rollout.rewards[0], rollout.rewards[1])


# ---- The gradient ----


@pytest.mark.parametrize("lora", [True, False])
def test_the_gradient_is_that_of_the_objective(make, lora):
    """Against a loop over images and steps that is written from the formula."""
    engine = make(lora=lora, **WHOLE)
    rollout = roll_out(engine, 1)
    trajectory, policy = rollout.trajectory, engine.policy
    assert rollout.advantages.abs().min() > 0
    engine.backward(rollout, torch.arange(8))
    found = gradients(engine)
    for image in range(8):
        for step in range(2):
            index = rollout.plan.window.start + step
            sample, following = (trajectory.states[image, step + i][None] for i in (0, 1))
            prompt = trajectory.conditioning[[image // 4]]
            velocity = policy.velocity(sample, engine.scheduler.timesteps[index], prompt)
            log_prob = engine.scheduler.log_prob(velocity, sample, following, index)
            ratio = torch.exp(log_prob - trajectory.log_probs[image, step])
            weight = engine.step_weights[index]
            (-rollout.advantages[image] * ratio * weight / 16).sum().backward()
    assert_close(found, gradients(engine))


@pytest.mark.parametrize("kwargs", [{"beta": 0.0}, {"beta": 0.1}])
def test_the_gradient_does_not_depend_on_memory_settings(make, kwargs):
    engine = make(**WHOLE, **kwargs)
    rollout = roll_out(engine)
    loss = engine.backward(rollout, rollout.order).loss
    expected = gradients(engine)
    for pass_size in (1, 5):
        batch = engine.backward(rollout, rollout.order, pass_size=pass_size)
        assert [len(p.ratio) for p in batch.passes] == [pass_size] * (16 // pass_size) + [1] * (pass_size == 5)
        torch.testing.assert_close(batch.loss, loss, rtol=0, atol=1e-4)
        assert_close(gradients(engine), expected)
    # In two training batches of one optimizer step
    for part in rollout.order.split(4):
        engine.backward(rollout, part, accumulation_steps=2)
    assert_close(gradients(engine), expected)
    engine.policy.transformer.enable_gradient_checkpointing()
    engine.backward(rollout, rollout.order)
    assert_close(gradients(engine), expected)
    # Sampled in parts. The rewards are those of images with 8 bits, which might differ by a step.
    engine.settings.sample_batch_size = 3
    parts = roll_out(engine)
    parts.advantages = rollout.advantages
    engine.backward(parts, rollout.order)
    assert_close(gradients(engine), expected)


def test_images_without_an_advantage_are_not_replayed(make):
    engine = make()
    rollout = roll_out(engine)
    rollout.advantages[4:] = 0
    images, steps = engine.transitions_to_train(rollout, torch.tensor([6, 1, 5, 3]))
    assert images.tolist() == [1, 1, 3, 3] and steps.tolist() == [0, 1, 0, 1]
    # With nothing to learn one transition is left, so that every rank has a backward pass, and a gradient of zero.
    batch = engine.backward(rollout, torch.tensor([4, 5, 6, 7]))
    assert [len(p.ratio) for p in batch.passes] == [1] and batch.loss == 0
    assert all((gradient == 0).all() for gradient in gradients(engine).values())
    # The KL term needs them all.
    engine.settings.beta = 0.1
    assert len(engine.transitions_to_train(rollout, torch.tensor([4, 5]))[0]) == 4


def test_only_the_extremes_of_each_group_are_trained(make):
    rollout = roll_out(make(replay_top_k=1))
    kept = rollout.advantages.view(2, 4)
    assert ((kept != 0).sum(1) == 2).all() and (kept.amax(1) > 0).all() and (kept.amin(1) < 0).all()
    batches = rollout.training_batches(4)
    assert [int((rollout.advantages[images] != 0).sum()) for images in batches] == [2, 2]


def test_a_fraction_of_the_window(make):
    engine = make(window_size=4, window_train_fraction=0.6)
    for iteration in (0, 1):
        rollout = roll_out(engine, iteration)
        trained = rollout.plan.steps.tolist()
        assert len(trained) == 2
        images, steps = engine.transitions_to_train(rollout, rollout.order[:4])
        assert len(images) == 4 * 2 and sorted(set(steps.tolist())) == trained


def test_clipped_transitions_have_no_gradient(make):
    engine = make(**WHOLE, epsilon=1e-6)
    rollout = roll_out(engine)
    recorded = rollout.trajectory.log_probs.clone()
    good = rollout.advantages > 0
    for sign, images in ((1, good), (-1, good), (-1, ~good), (1, ~good)):
        images = images.nonzero().flatten()
        # Pretend that the policy was less, or more, likely to do this when it did.
        rollout.trajectory.log_probs = recorded - 0.5 * sign
        objective = engine.objective(rollout, images, torch.zeros_like(images))
        objective.losses.sum().backward()
        largest = max(gradient.abs().max().item() for gradient in gradients(engine).values())
        moved_as_wanted = (sign > 0) == bool(good[images[0]])
        assert (largest == 0) == moved_as_wanted
        assert objective.statistics["clip_ratio/region_mean"] == moved_as_wanted


OBJECTIVES = [("grpo", "rectified"), ("grpo", "noise"), ("grpo_guard", "none"), ("dppo", "rectified")]


@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps", "dpm"])
@pytest.mark.parametrize(("loss_type", "weighting"), OBJECTIVES)
def test_objectives_at_each_place_of_the_window(make, sde_type, loss_type, weighting):
    engine = make(sde_type=sde_type, eta=0.5, loss_type=loss_type, step_weighting=weighting, suffix_ratio=0.5)
    steps = engine._all_transitions()
    for iteration in range(3):
        rollout = roll_out(engine, iteration)
        start = rollout.plan.window.start
        assert start == iteration
        batch = engine.backward(rollout, rollout.order)
        (only,) = batch.passes
        assert (only.ratio - 1).abs().max() < 1e-5 and only.statistics["clip_ratio/region_mean"] == 0
        # The step of the window is that of the whole schedule, also where the suffix is shortened.
        assert torch.equal(rollout.trajectory.transitions.sigmas, steps.sigmas[start : start + 2])
        weights = engine.step_weights[start + only.steps]
        if loss_type == "grpo_guard":
            weights = weights / (steps.sigmas - steps.next_sigmas)[start + only.steps]
        expected = -rollout.advantages[only.images] * weights
        torch.testing.assert_close(only.losses, expected, rtol=1e-4, atol=1e-5)
        assert gradients(engine)


def test_step_weights_are_of_the_trained_steps(make):
    engine = make(num_inference_steps=9, window_last_start=0.5)  # rectified by default
    assert engine.step_weights.shape == (8,)  # all steps but the last
    assert float(engine.step_weights[:6].mean()) == pytest.approx(1, rel=1e-6)  # starts 0 to 4, two steps each
    sensitivities = engine._all_transitions().sensitivities()
    assert (engine.step_weights * sensitivities).std() < 1e-5 * sensitivities.mean()
    assert (make(step_weighting="none").step_weights == 1).all()


def test_mask_of_dppo_in_training(make):
    """After a large step in the direction of the gradient, the transitions that have gained have no gradient left."""
    found = {}
    for threshold in (1e-9, 1e3):
        engine = make(loss_type="dppo", kl_threshold=threshold)
        rollout = roll_out(engine)
        optimizer = torch.optim.SGD(engine.trained_parameters, lr=1.0)
        engine.backward(rollout, rollout.order)
        optimizer.step()
        optimizer.zero_grad()
        (only,) = engine.backward(rollout, rollout.order).passes
        found[threshold] = only.statistics["clip_ratio/region_mean"].item(), gradients(engine)
        gained = (only.ratio - 1) * rollout.advantages[only.images] > 0
        assert only.statistics["kl_old"] > 1e-9 and gained.any()
    assert found[1e-9][0] == gained.float().mean().item() and found[1e3][0] == 0
    assert any((found[1e-9][1][name] != value).any() for name, value in found[1e3][1].items())


def test_the_velocity_kl_term(make):
    kwargs = {"rewards": lambda prompts, images, **columns: [0.0] * len(images)}
    engine = make(beta=2.0, kl_type="velocity", **kwargs)
    rollout = roll_out(engine)
    batch = engine.backward(rollout, rollout.order)
    kl = batch.passes[0].statistics["kl"]
    assert batch.loss.item() == pytest.approx(2.0 * kl.item(), rel=1e-5)
    trajectory, policy = rollout.trajectory, engine.policy
    images, steps = trajectory.transition_indices()
    timesteps = trajectory.transitions.timesteps[steps]
    conditioning = trajectory.conditioning[trajectory.prompt_indices[images]]
    sample = trajectory.states[images, steps]
    velocity = policy.velocity(sample, timesteps, conditioning)
    policy.pipe.transformer.disable_adapters()
    reference = policy.velocity(sample, timesteps, conditioning)
    policy.pipe.transformer.enable_adapters()
    assert (velocity - reference).square().mean().item() == pytest.approx(kl.item(), rel=1e-3)


@pytest.mark.parametrize("lora", [True, False])
def test_the_kl_term(make, lora):
    engine = make(lora=lora, beta=2.0, rewards=lambda prompts, images, **columns: [0.0] * len(images))
    generator = torch.Generator().manual_seed(0)
    parameters = engine.trained_parameters
    if lora:
        for name, parameter in engine.policy.transformer.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()  # the reference is the model without its LoRA
    engine.settings.window_train_fraction = 0.5
    rollout = roll_out(engine)
    (step,) = rollout.plan.steps.tolist()
    assert (rollout.reference_means[:, step] != 0).any() and (rollout.reference_means[:, 1 - step] == 0).all()
    # At the reference there is none, up to the rounding of means of order 1 that a std of 0.1 or more divides.
    batch = engine.backward(rollout, rollout.order)
    assert batch.passes[0].statistics["kl"] < 1e-8
    gradients(engine)
    # Away from it the loss is that of the formula, and its gradient points back.
    size = 0.1 if lora else 0.02
    directions = [size * torch.randn(p.shape, generator=generator) for p in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter += direction
    batch = engine.backward(rollout, rollout.order)
    kl = batch.passes[0].statistics["kl"]
    assert kl > 1e-5 and batch.loss.item() == pytest.approx(2.0 * kl.item(), rel=1e-4)
    assert sum((p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True)) > 0
    replay = rollout.trajectory.replay(engine.policy, *engine.transitions_of(rollout, torch.arange(8)))
    distance = ((replay.means - rollout.reference_means[:, step]) / replay.stds).square().mean() / 2
    assert distance.item() == pytest.approx(kl.item(), rel=1e-2)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora": False, "window_train_fraction": 0.5},
        {"sample_batch_size": 4, "window_strategy": "frozen", "window_start": 1},
        {"bf16": True},
        {"loss_type": "grpo_guard", "step_weighting": "noise"},
        {"loss_type": "dppo"},
    ],
    ids=lambda kwargs: "_".join(kwargs) or "lora",
)
def test_the_graph_of_a_rollout_gives_the_gradient_of_a_replay(make, kwargs):
    found = []
    for reuse in (False, True):
        engine = make(**WHOLE, **kwargs, reuse_rollout_graph=reuse)
        rollout = roll_out(engine)
        batch = engine.backward(rollout, rollout.order)
        found.append(gradients(engine))
    assert (batch.passes[0].ratio == 1).all()  # it is the rollout itself
    # bfloat16 has 8 bits, so each of its roundings is 4e-3 of a number.
    assert_close(found[1], found[0], share=5e-2 if "bf16" in kwargs else 1e-4)


# ---- Evaluation ----


def test_evaluation_does_not_depend_on_batches(make):
    engine = make(rewards=[redness, lambda prompts, images, **columns: [1.0] * len(images)])
    images = []
    for size in (1, 2, 5):
        engine.settings.per_device_eval_batch_size = size
        rewards = Evaluator(engine).evaluate(PROMPTS).rewards
        assert rewards.shape == (2, 5) and (rewards[1] == 1).all()
        images.append(pixels(Evaluator(engine).sample_images([row["prompt"] for row in PROMPTS], range(5))))
        assert rewards[0].tolist() == redness([], [Image.fromarray(image.astype("uint8")) for image in images[-1]])
    assert max(np.abs(other - images[0]).max() for other in images) <= 1


@pytest.mark.parametrize(
    "kwargs",
    [{"eval_num_inference_steps": 3}, {"shift": 2.0}, {"eval_height": 64}, {"eval_height": 48, "eval_width": 64}],
)
def test_evaluation_images_are_those_of_the_stock_pipeline(make, kwargs):
    engine = make(**kwargs, sde_type="dance", ode_solver="dpmsolver++")
    list(engine.sample(engine.plan(0, ROWS)))  # at the size of training
    images = Evaluator(engine).sample_images(["a cat", "red"], [7, 8])
    pipe = engine.policy.pipe
    if "shift" in kwargs:
        assert pipe.scheduler.config.use_dynamic_shifting  # the pipeline keeps its own
        changes = {"shift": 2.0, "use_dynamic_shifting": False}
        pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, **changes))
    arguments = {"height": kwargs.get("eval_height", 32), "width": kwargs.get("eval_width", 32)}
    arguments["max_sequence_length"] = 12
    arguments["num_inference_steps"] = kwargs.get("eval_num_inference_steps", SMALL["num_inference_steps"])
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    stock = pipe(["a cat", "red"], generator=generators, **arguments).images
    assert np.array_equal(pixels(images), pixels(stock))  # the same passes of the same shapes


def test_evaluation_has_the_timestep_shift_of_its_own_size(make):
    engine = make(eval_height=64)
    pipe = engine.policy.pipe
    training, evaluation = (make_scheduler(pipe.scheduler, engine.settings, evaluation=True) for _ in range(2))
    engine.policy.prepare_scheduler(training)
    Evaluator(engine).policy.prepare_scheduler(evaluation)
    steps = {"num_inference_steps": SMALL["num_inference_steps"], "max_sequence_length": 12}
    pipe("a", height=64, width=32, output_type="latent", **steps)
    assert torch.equal(evaluation.sigmas, pipe.scheduler.sigmas)
    # More tokens, a larger shift: more of the steps at high noise
    assert (evaluation.sigmas[1:-1] > training.sigmas[1:-1]).all()
