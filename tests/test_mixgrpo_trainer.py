"""The trainer, end to end, on a miniature FLUX with random weights."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import build_pipeline, redness
from diffusers import EulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer, RewardError
from diffusers_mixgrpo.prepare_pipeline import make_scheduler


PROMPTS = [{"prompt": text, "tag": i} for i, text in enumerate(["a cat", "two dogs", "sea", "red", "blue tree"])]


class Recorder:
    """A reward that remembers how it was called, and gives what it is told to."""

    __name__ = "recorder"

    def __init__(self, give=redness):
        self.give = give
        self.calls = []

    def __call__(self, prompts, images, **columns):
        self.calls.append((prompts, images, columns))
        return self.give(prompts, images, **columns)


@pytest.fixture
def make(tmp_path, tiny_pipe):
    """A trainer of two prompts with four images each per iteration, two optimizer steps in each."""

    def make(rewards=redness, lora=True, pipe=None, train_dataset=PROMPTS, eval_dataset=None, **kwargs):
        peft_config = kwargs.pop("peft_config", LoraConfig(r=4, lora_alpha=8) if lora else None)
        trainer = {name: kwargs.pop(name) for name in ("callbacks", "optimizers") if name in kwargs}
        config = {
            "output_dir": str(tmp_path / "output"),
            "height": 32,
            "width": 32,
            "num_inference_steps": 5,
            "max_sequence_length": 12,
            "window_size": 2,
            "window_interval": 1,
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "steps_per_generation": 2,
            "epsilon": 1e-2,
            "learning_rate": 1e-3,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return MixGRPOTrainer(
            tiny_pipe if pipe is None else pipe,
            rewards,
            MixGRPOConfig(**(config | kwargs)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            **trainer,
        )

    return make


def trained(trainer) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {n: p.detach().clone() for n, p in trainer.pipe.transformer.named_parameters() if p.requires_grad}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name, **({"rtol": 0, "atol": 0} | tolerance))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


# ---- Learning ----


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns(make, lora):
    trainer = make(
        lora=lora,
        eval_dataset=PROMPTS,
        learning_rate=1e-2 if lora else 1e-3,
        max_steps=40,
        num_generations=8,
        per_device_train_batch_size=8,
        steps_per_generation=4,
        window_interval=2,
    )
    frozen = {n: p.clone() for n, p in trainer.pipe.vae.named_parameters()}
    base = {n: p.clone() for n, p in trainer.pipe.transformer.named_parameters() if not p.requires_grad}
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward"] > before["eval_reward"] + 5 * before["eval_reward_se"]
    assert np.mean(logged(trainer, "reward")[-2:]) > np.mean(logged(trainer, "reward")[:2])
    assert_same(frozen, dict(trainer.pipe.vae.named_parameters()))
    assert bool(base) == lora
    for name, value in base.items():
        assert torch.equal(value, dict(trainer.pipe.transformer.named_parameters())[name])


def test_the_opposite_reward_goes_the_other_way(make):
    def greenness(prompts, images, **columns):
        return [-score for score in redness(prompts, images)]

    trainer = make([redness, greenness], lora=False, reward_weights=[0.0, 1.0], max_steps=40)
    before = np.mean(redness([], trainer.sample_images([row["prompt"] for row in PROMPTS])))
    trainer.train()
    after = np.mean(redness([], trainer.sample_images([row["prompt"] for row in PROMPTS])))
    assert after < before - 0.002
    assert logged(trainer, "rewards/redness/mean") and logged(trainer, "rewards/greenness/mean")


# ---- Batch arithmetic ----


def test_the_papers_setting(make):
    """12 images of one prompt, 3 per optimizer step, 4 optimizer steps an iteration."""
    reward, steps = Recorder(), []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            steps.append(len(reward.calls))

    trainer = make(
        reward,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        steps_per_generation=4,
        num_generations=12,
        max_steps=8,
        callbacks=[Count()],
    )
    trainer.train()
    assert trainer.state.global_step == 8
    calls = reward.calls[1:]  # the first tried the reward
    assert [len(images) for _, images, _ in calls] == [12, 12]
    assert all(len(set(prompts)) == 1 for prompts, _, _ in calls)
    assert steps == [2] * 4 + [3] * 4  # four optimizer steps after each sampling


def test_columns_reach_the_reward(make):
    reward = Recorder()
    make(reward, max_steps=2).train()
    prompts, images, columns = reward.calls[-1]
    assert len(prompts) == len(images) == len(columns["tag"]) == 8
    assert [PROMPTS[tag]["prompt"] for tag in columns["tag"]] == prompts
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    assert columns.keys() == {"tag"}


def test_several_passes_over_the_same_images(make):
    reward = Recorder()
    trainer = make(reward, num_iterations=2, max_steps=8, learning_rate=1e-2)
    trainer.train()
    assert len(reward.calls) == 1 + 2  # one trial, two iterations of four optimizer steps
    deviation = logged(trainer, "ratio/max_deviation")
    assert deviation[0] < 1e-6 < deviation[1] and deviation[4] < 1e-6 < deviation[5]
    assert [d for d in logged(trainer, "ratio/on_policy_max_deviation") if d > 1e-6] == []


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "weight_decay": 0.0}


def one_iteration(make, **kwargs):
    """The gradient of an iteration with a single optimizer step, as the change of the weights under plain SGD."""
    pipe = build_pipeline()
    trainer = make(pipe=pipe, **SGD, **kwargs)
    before = trained(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    return {name: before[name] - value for name, value in trained(trainer).items()}, trainer


WHOLE = {"max_steps": 1, "per_device_train_batch_size": 8, "steps_per_generation": 1}


@pytest.mark.parametrize("lora", [True, False])
def test_the_gradient_is_that_of_the_objective(make, lora):
    """Against a loop over images and steps that is written from the formula."""
    gradient, trainer = one_iteration(make, lora=lora, **WHOLE)
    rollout = trainer._rollout
    assert rollout.advantages.abs().min() > 0
    reference = make(lora=lora, pipe=build_pipeline())
    transformer, policy = reference.pipe.transformer, reference.policy
    for image in range(8):
        for step in range(2):
            index = int(rollout.trajectory.step_indices[step])
            sample, following = (rollout.trajectory.states[image, step + i][None] for i in (0, 1))
            prompt = rollout.conditioning[[image // 4]]
            velocity = policy.velocity(sample, trainer.noise_scheduler.timesteps[index], prompt)
            log_prob = trainer.noise_scheduler.log_prob(velocity, sample, following, index)
            ratio = torch.exp(log_prob - rollout.trajectory.log_probs[image, step])
            (-rollout.advantages[image] * ratio / 16).sum().backward()
    expected = {n: p.grad for n, p in transformer.named_parameters() if p.requires_grad}
    assert max(value.abs().max() for value in expected.values()) > 1e-5
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kwargs", [{"replay_batch_size": 1}, {"replay_batch_size": 5}, {"sample_batch_size": 3}])
def test_the_gradient_does_not_depend_on_memory_settings(make, kwargs):
    expected, _ = one_iteration(make, **WHOLE)
    gradient, _ = one_iteration(make, **WHOLE, **kwargs)
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)


def test_accumulation_gives_the_gradient_of_the_whole(make):
    expected, _ = one_iteration(make, **WHOLE)
    parts = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    gradient, trainer = one_iteration(make, **{**WHOLE, **parts})
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)
    _, whole = one_iteration(make, **WHOLE)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole.state.log_history[0]["loss"], abs=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(make):
    expected, _ = one_iteration(make, **WHOLE)
    gradient, trainer = one_iteration(make, **WHOLE, gradient_checkpointing=True)
    assert trainer.pipe.transformer.is_gradient_checkpointing
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="every_n_layers=2"):
        kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
        one_iteration(make, **WHOLE, **kwargs)


def test_images_without_an_advantage_are_not_replayed(make):
    rows = []

    def replayed(trainer):
        forward = trainer.policy.velocity
        trainer.policy.velocity = lambda latents, *args: (
            (rows.append(len(latents)) if torch.is_grad_enabled() else None) or forward(latents, *args)
        )

    def first_group_only(prompts, images, **columns):
        return redness(prompts, images) if len(images) < 8 else redness(prompts, images[:4]) + [0.5] * 4

    trainer = make(first_group_only, pipe=build_pipeline(), **SGD, **WHOLE)
    replayed(trainer)
    trainer.train()
    assert rows == [4 * 2]  # one group, two window steps
    # With nothing to learn one transition is left, so that every rank has a backward pass, and nothing changes.
    rows.clear()
    trainer = make(lambda prompts, images, **columns: [0.1] * len(images), pipe=build_pipeline(), **SGD, **WHOLE)
    replayed(trainer)
    before = trained(trainer)
    trainer.train()
    assert rows == [1]
    assert_same(trained(trainer), before)
    assert logged(trainer, "frac_reward_zero_std") == [1.0]


def test_a_fraction_of_the_window(make):
    rows = []
    trainer = make(window_size=4, window_train_fraction=0.6, max_steps=4)
    inner = trainer._compute_losses

    def compute_losses(model, images, steps, on_policy):
        rows.append((len(images), sorted(set(steps.tolist()))))
        return inner(model, images, steps, on_policy)

    trainer._compute_losses = compute_losses
    trainer.train()
    assert [count for count, _ in rows] == [4 * 2] * 4  # 2 of 4 steps, of 4 images
    assert rows[0][1] == rows[1][1] and rows[2][1] == rows[3][1]  # the same within an iteration


def test_clipping(make):
    """With a clip range that nothing fits in, what has moved too far gets no gradient, but the first step has one."""
    batches = {"per_device_train_batch_size": 8, "steps_per_generation": 1, "num_iterations": 2, "max_steps": 2}
    trainer = make(epsilon=1e-6, learning_rate=1e-2, **batches)
    trainer.train()
    high, low = logged(trainer, "clip_ratio/high_mean"), logged(trainer, "clip_ratio/low_mean")
    assert logged(trainer, "clip_ratio/region_mean")[-1] == pytest.approx(high[-1] + low[-1])
    assert high[0] == low[0] == 0
    assert high[-1] + low[-1] > 0.5  # most moved the right way, and beyond the range
    # A range of one side only
    trainer = make(pipe=build_pipeline(), epsilon=1.0, epsilon_high=1e-6, learning_rate=1e-2, **batches)
    trainer.train()
    assert logged(trainer, "clip_ratio/low_mean") == [0.0, 0.0]
    assert logged(trainer, "clip_ratio/high_mean")[-1] > 0


def test_clipped_transitions_have_no_gradient(make):
    trainer = make(**WHOLE, epsilon=1e-6)
    trainer.train()
    rollout, transformer = trainer._rollout, trainer.pipe.transformer
    good = rollout.advantages > 0
    for sign, images in ((1, good), (-1, good), (-1, ~good), (1, ~good)):
        images = images.nonzero().flatten()
        steps = torch.zeros_like(images)
        # Pretend that the policy was less, or more, likely to do this when it did
        recorded = rollout.trajectory.log_probs.clone()
        rollout.trajectory.log_probs -= 0.5 * sign
        transformer.zero_grad()
        trainer._compute_losses(transformer, images, steps, False).sum().backward()
        rollout.trajectory.log_probs.copy_(recorded)
        gradient = max(p.grad.abs().max().item() for p in transformer.parameters() if p.requires_grad)
        moved_as_wanted = (sign > 0) == bool(good[images[0]])
        assert (gradient == 0) == moved_as_wanted


# ---- KL ----


@pytest.mark.parametrize("lora", [True, False])
def test_kl_to_the_reference(make, lora):
    # The reward says nothing, so all that moves the weights is the KL, and it is 0 at the reference.
    constant = {"rewards": lambda prompts, images, **columns: [0.0] * len(images)}
    trainer = make(lora=lora, beta=1.0, optim="sgd", **constant)
    trainer.train()
    assert max(logged(trainer, "kl")) < 1e-10
    # Away from it, KL pulls back.
    trainer = make(lora=lora, pipe=build_pipeline(), beta=1.0, learning_rate=1e-3, max_steps=20, **constant)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.pipe.transformer.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    trainer.train()
    assert logged(trainer, "kl")[0] > 0
    assert logged(trainer, "kl")[-1] < 0.5 * logged(trainer, "kl")[0]


# ---- Precision ----


@pytest.mark.parametrize("lora", [True, False])
def test_bfloat16(make, pipeline_folder, lora):
    trainer = make(lora=lora, pipe=pipeline_folder, bf16=True, eval_dataset=PROMPTS)
    transformer = trainer.pipe.transformer
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.pipe.vae.parameters()} == {torch.bfloat16}
    if lora:
        assert {p.dtype for p in transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = trained(trainer)
    trainer.evaluate()
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(trainer).items())
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) < 1e-3


def test_dropout_is_off(make):
    gradient, trainer = one_iteration(make, **WHOLE, peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5))
    assert max(logged(trainer, "ratio/max_deviation")) < 1e-6
    expected, _ = one_iteration(make, **WHOLE)
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)


# ---- Evaluation ----


def test_evaluation_does_not_depend_on_batches(make):
    metrics = []
    for size in (1, 2, 5):
        trainer = make(
            [redness, Recorder(lambda p, i, **c: [None, 1.0][: len(i)] + [1.0] * (len(i) - 2))],
            pipe=build_pipeline(),
            eval_dataset=PROMPTS,
            per_device_eval_batch_size=size,
            reward_weights=[1.0, 0.0],
        )
        metrics.append(trainer.evaluate())
    for other in metrics[1:]:
        assert other["eval_reward"] == pytest.approx(metrics[0]["eval_reward"], abs=1e-4)
    assert metrics[2]["eval_rewards/recorder/failed"] == 1
    assert metrics[2]["eval_rewards/recorder/mean"] == 1
    assert metrics[2]["eval_reward"] == pytest.approx(metrics[2]["eval_rewards/redness/mean"])
    spread = metrics[2]["eval_rewards/redness/std"]
    assert metrics[2]["eval_reward_se"] == pytest.approx(spread / math.sqrt(5), rel=1e-6)


def test_evaluation_pictures_are_the_stock_pipelines(make):
    reward = Recorder()
    trainer = make(reward, eval_dataset=PROMPTS, eval_seed=7, eval_num_inference_steps=3)
    trainer.train()
    trainer.evaluate()
    generators = [torch.Generator().manual_seed(7 + i) for i in range(5)]
    arguments = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 3}
    stock = trainer.pipe([row["prompt"] for row in PROMPTS], generator=generators, **arguments).images
    assert np.array_equal(pixels(reward.calls[-1][1]), pixels(stock))
    assert np.array_equal(pixels(trainer.sample_images([row["prompt"] for row in PROMPTS])), pixels(stock))


def test_evaluation_during_training(make):
    trainer = make(eval_dataset={"one": PROMPTS[:2], "two": PROMPTS[2:]}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    # Every optimizer step asks for one; it waits for the end of the iteration, which has two.
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_one_reward" in entry]
    assert steps == [2, 4]
    assert len(logged(trainer, "eval_two_rewards/redness/mean")) == 2


def test_a_static_shift(make):
    trainer = make(shift=2.0)
    trainer.policy.prepare_scheduler(trainer.noise_scheduler)
    assert trainer.noise_scheduler.sigmas[1].item() == pytest.approx(2 * 0.8 / (1 + 0.8), rel=1e-6)
    scheduler = make_scheduler(trainer.pipe, trainer.args, evaluation=True)
    trainer.policy.prepare_scheduler(scheduler)
    assert torch.equal(scheduler.sigmas, trainer.noise_scheduler.sigmas)
    assert trainer.pipe.scheduler.config.use_dynamic_shifting  # the pipeline keeps its own


# ---- Logging ----


def test_metrics(make):
    trainer = make(window_size=2, window_interval=1, max_steps=6, ode_solver="dpmsolver++", suffix_ratio=0.5)
    trainer.train()
    assert logged(trainer, "window/start") == [0, 1, 2]
    assert logged(trainer, "nfe") == [2 + 2, 1 + 2 + 1, 2 + 2 + 1]
    assert logged(trainer, "nfe_amortized") == [4, 1 / 4 + 2 + 1, 2 / 4 + 2 + 1]
    names = ["reward", "reward_std", "frac_reward_zero_std", "rewards/redness/mean", "rewards/redness/std"]
    names += ["rewards/redness/failed", "time/sampling", "time/decoding", "time/reward", "time/training"]
    for name in names:
        assert len(logged(trainer, name)) == 3, name
    names = ["loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean"]
    for name in [*names, "ratio/max_deviation"]:
        assert len(logged(trainer, name)) == 6, name
    json.dumps(trainer.state.log_history)


def test_one_progress_bar_with_the_reward(make, capfd):
    make(max_steps=4, logging_steps=1, disable_tqdm=False).train()
    shown = capfd.readouterr()
    assert "{'loss'" not in shown.out + shown.err
    last = shown.err.replace("\r", "\n").strip().splitlines()[-1]
    assert "4/4" in last and "reward=" in last and "window=" in last


def test_sample_grids(make, tmp_path):
    trainer = make(logging_images_steps=4, num_logged_images=6, max_steps=8)
    trainer.train()
    files = sorted(os.listdir(tmp_path / "output" / "images"))
    assert files == ["step_000000.png", "step_000004.png"]
    with Image.open(tmp_path / "output" / "images" / files[0]) as grid:
        assert grid.width == 4 * 168 and grid.height > 2 * 160


# ---- Saving ----


def sample(pipe):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    arguments = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 4}
    return pixels(pipe(["a cat", "red", "x"], generator=generators, **arguments).images)


def test_a_lora_comes_back_in_the_stock_pipeline(make, tmp_path, pipeline_folder):
    trainer = make(peft_config=LoraConfig(r=4, lora_alpha=32), learning_rate=3e-2, max_steps=8)
    trainer.train()
    trainer.save_model()
    expected = sample(trainer.pipe)
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    untrained = sample(stock)
    stock.load_lora_weights(str(tmp_path / "output"))
    assert np.abs(expected - untrained).max() > 20
    assert np.array_equal(sample(stock), expected)


def test_a_full_fine_tuning_comes_back_in_the_stock_pipeline(make, tmp_path, pipeline_folder):
    trainer = make(lora=False, learning_rate=3e-3, max_steps=8)
    trainer.train()
    trainer.save_model()
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "output", subfolder="transformer")
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    untrained = sample(stock)
    stock.transformer = transformer
    stock.vae.to(memory_format=torch.channels_last)  # as the trainer has it, which rounds otherwise
    assert np.abs(sample(stock) - untrained).max() > 20
    assert np.array_equal(sample(stock), sample(trainer.pipe))


def test_training_goes_on_with_a_loaded_lora(make, tmp_path, pipeline_folder):
    trainer = make(max_steps=4)
    trainer.train()
    trainer.save_model()
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(tmp_path / "output"), adapter_name="mine")
    again = make(pipe=pipe, lora=False, output_dir=str(tmp_path / "again"))
    before = trained(again)
    assert before and all(".mine." in name for name in before)
    first = trained(trainer)
    assert_same({name.replace(".mine.", ".default."): value for name, value in before.items()}, first)
    again.train()
    again.save_model()
    assert any(not torch.equal(value, before[name]) for name, value in trained(again).items())
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(tmp_path / "again"))
    again.pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(sample(stock), sample(again.pipe))


@pytest.mark.parametrize("lora", [True, False])
def test_resuming_is_exact(make, tmp_path, lora):
    """Through ends of epochs (five prompts, two per iteration), with a moving window and a learning rate schedule."""
    kwargs = {"lora": lora, "max_steps": 10, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
    reward = Recorder()
    whole = make(reward, pipe=build_pipeline(), **kwargs)
    whole.train()
    for step in (2, 4, 6):  # inside an epoch, at its end, inside the next
        again = Recorder()
        resumed = make(again, pipe=build_pipeline(), **kwargs)
        for parameter in resumed.pipe.transformer.parameters():
            parameter.data += parameter.requires_grad * 0.1  # what is trained must come from the checkpoint
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{step}"))
        assert_same(trained(resumed), trained(whole))
        assert [call[0] for call in again.calls[1:]] == [call[0] for call in reward.calls[1 + step // 2 :]]
        for mine, others in zip(again.calls[1:], reward.calls[1 + step // 2 :], strict=True):
            assert np.array_equal(pixels(mine[1]), pixels(others[1]))
        assert logged(resumed, "window/start") == logged(whole, "window/start")
        assert logged(resumed, "reward") == logged(whole, "reward")


def test_resuming_a_second_time_with_more_steps(make, tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 2}
    make(pipe=build_pipeline(), max_steps=4, **kwargs).train()
    resumed = make(pipe=build_pipeline(), max_steps=8, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    straight = make(pipe=build_pipeline(), max_steps=8)
    straight.train()
    assert_same(trained(resumed), trained(straight))


def test_checkpoints_wait_for_the_end_of_an_iteration(make, tmp_path):
    make(max_steps=8, steps_per_generation=4, save_strategy="steps", save_steps=3, save_total_limit=5).train()
    folders = sorted(name for name in os.listdir(tmp_path / "output") if name.startswith("checkpoint"))
    assert folders == ["checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_of_another_kind(make, tmp_path):
    make(pipe=build_pipeline(), max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="has no transformer, so it is no checkpoint of a full fine-tuning"):
        make(pipe=build_pipeline(), lora=False).train(resume_from_checkpoint=checkpoint)


def test_the_best_model_is_loaded_at_the_end(make):
    rewards = iter([0.5, 0.9, 0.2])

    def judge(prompts, images, **columns):
        return [next(rewards)] * 5 if len(images) == 5 else redness(prompts, images)

    trainer = make(
        judge,
        eval_dataset=PROMPTS,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        max_steps=6,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = trained(trainer)

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_metric == 0.9
    assert_same(trained(trainer), weights[4])


@pytest.mark.parametrize("lora", [True, False])
def test_model_card(make, tmp_path, pipeline_folder, lora):
    trainer = make(lora=lora, shift=3.0)
    trainer.train()
    trainer.create_model_card(
        model_name="red", tags="toy", finetuned_from="black-forest-labs/FLUX.1-dev", dataset="someone/prompts"
    )
    card = ModelCard.load(tmp_path / "output" / "README.md")
    assert card.data.base_model == "black-forest-labs/FLUX.1-dev"
    assert card.data.library_name == "diffusers" and "toy" in card.data.tags
    assert "2 iterations of 8 images" in card.text and "`redness`" in card.text
    # The code in it is what a stranger will run. So run it, with the names of things that are here.
    code = card.text.split("```python\n")[1].split("```")[0]
    shift = card.text.split("```python\n")[2].split("```")[0]
    trainer.save_model()
    code = code.replace("black-forest-labs/FLUX.1-dev", pipeline_folder).replace(
        '"red"', repr(str(tmp_path / "output"))
    )
    code = code.replace("bfloat16", "float32").replace("cuda", "cpu")
    names: dict = {}
    code, call = code.split("image = ")
    exec(code + shift + "image = " + call, names)
    expected = trainer.sample_images([PROMPTS[0]["prompt"]], [0])
    assert np.array_equal(pixels([names["image"]]), pixels(expected))


def test_model_card_of_a_local_pipeline(make, tmp_path, pipeline_folder):
    trainer = make(pipe=pipeline_folder)
    trainer.create_model_card()
    text = (tmp_path / "output" / "README.md").read_text()
    assert pipeline_folder not in text and "path/to/the/base/pipeline" in text


def test_push_to_hub(make, tmp_path, monkeypatch):
    """What would be uploaded, and where to; only the network is missing."""
    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Url", (), {"repo_id": f"someone/{name}"})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploads.append((repo_id, sorted(os.listdir(folder_path)), kwargs["ignore_patterns"]))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make(max_steps=2)
    trainer.train()
    trainer.push_to_hub(dataset="someone/prompts")
    assert uploads == [
        (
            "someone/output",
            ["README.md", "pytorch_lora_weights.safetensors", "training_args.bin"],
            ["_*", "checkpoint-*"],
        )
    ]
    assert 'load_lora_weights("someone/output"' in (tmp_path / "output" / "README.md").read_text()


# ---- Saving work ----


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, before it is clipped."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora": False},
        {"sample_batch_size": 4},
        {"window_train_fraction": 0.5},
        {"window_start": 1},
        {"bf16": True},
    ],
    ids=lambda kwargs: "_".join(kwargs) or "lora",
)
def test_the_rollout_s_own_graph_gives_the_replay_s_gradient(make, kwargs):
    found = []
    # float32 rollouts and replays of the same batch, or bfloat16 would differ by its rounding
    kwargs = {"steps_per_generation": 1, "per_device_train_batch_size": 8, "max_steps": 2, "max_grad_norm": 0} | kwargs
    kwargs |= {"window_strategy": "frozen"} if "window_start" in kwargs else {}
    for reuse in (False, True):
        gradients = Gradients()
        trainer = make(pipe=build_pipeline(), reuse_rollout_graph=reuse, callbacks=[gradients], **kwargs)
        trainer.train()
        found.append(gradients.steps)
    assert len(found[0]) == len(found[1]) == 2 and len(found[0][0]) == len(found[1][0]) > 4
    for replayed, reused in zip(found[0][0], found[1][0], strict=True):
        assert replayed.abs().max() > 0 or reused.abs().max() == 0
        tolerance = 3e-2 if "bf16" in kwargs else 1e-5
        assert (replayed - reused).norm() <= tolerance * replayed.norm() + 1e-12
    assert sum(float(gradient.norm()) for gradient in found[1][0]) > 0
    assert logged(trainer, "ratio/on_policy_max_deviation")[0] == 0


def test_a_rollout_that_keeps_its_graph_draws_the_same(make):
    states = []
    for reuse in (False, True):
        trainer = make(pipe=build_pipeline(), steps_per_generation=1, per_device_train_batch_size=8, max_steps=1)
        trainer.args.reuse_rollout_graph = reuse
        trainer.train()
        states.append(trainer._rollout.trajectory)
    assert torch.equal(states[0].states, states[1].states) and torch.equal(states[0].latents, states[1].latents)
    assert torch.equal(states[0].log_probs, states[1].log_probs.detach())
    assert states[1].log_probs.requires_grad and not states[1].states.requires_grad


def test_only_the_extremes_are_replayed(make):
    counts = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            def note(module, args, kwargs):
                if torch.is_grad_enabled():
                    counts.append(len(kwargs["hidden_states"]))

            self.handle = model.register_forward_pre_hook(note, with_kwargs=True)

    for k, passes in ((None, 16), (1, 8)):
        counts.clear()
        trainer = make(pipe=build_pipeline(), replay_top_k=k, max_steps=2, callbacks=[Count()])
        trainer.train()
        assert sum(counts) == passes and len(set(counts)) == 1  # two batches, 8 images x 2 steps or half of it
        kept = trainer._rollout.advantages.view(2, 4)
        if k == 1:
            assert ((kept != 0).sum(1) == 2).all() and (kept.amax(1) > 0).all() and (kept.amin(1) < 0).all()


@pytest.mark.parametrize(
    "cache",
    [
        {"name": "FirstBlockCacheConfig", "threshold": 10.0},
        {"name": "TaylorSeerCacheConfig", "cache_interval": 3, "disable_cache_before_step": 1},
    ],
    ids=lambda c: c["name"],
)
def test_a_cache_works_outside_the_window_alone(make, cache):
    kwargs = {"num_inference_steps": 9, "window_strategy": "frozen", "window_start": 3, "learning_rate": 0.0}
    trainers = {}
    for name, ode_cache in (("plain", None), ("cached", cache)):
        trainers[name] = make(pipe=build_pipeline(), ode_cache=ode_cache, max_steps=2, **kwargs)
        trainers[name].train()
        assert not trainers[name].pipe.transformer.is_cache_enabled
    cached, plain = (trainers[name]._rollout.trajectory for name in ("cached", "plain"))
    assert not torch.equal(cached.states[:, 0], plain.states[:, 0])  # the prefix took the short-cut
    # The window's transitions are the model's own: replayed without any cache they have the same log-probs
    assert logged(trainers["cached"], "ratio/on_policy_max_deviation")[0] < 1e-5
    expected = trainers["plain"].evaluate(PROMPTS)["eval_reward"]
    assert trainers["cached"].evaluate(PROMPTS)["eval_reward"] == pytest.approx(expected, abs=1e-9)


def test_errors_of_options_that_save_work(make):
    with pytest.raises(ValueError, match="`reuse_rollout_graph=True` .* got steps_per_generation=2"):
        make(reuse_rollout_graph=True)
    with pytest.raises(ValueError, match="`replay_top_k` leaves out passes .* beta=0.1"):
        make(replay_top_k=1, beta=0.1)
    with pytest.raises(ValueError, match="`replay_top_k` must be 1 or more, or None, got 0"):
        make(replay_top_k=0)
    with pytest.raises(ValueError, match="`ode_cache` must have a 'name' among .*FirstBlockCacheConfig"):
        make(ode_cache={"name": "SecondBlock"})
    with pytest.raises(ValueError, match="`ode_cache=.*treshold"):
        make(pipe=build_pipeline(), ode_cache={"name": "FirstBlockCacheConfig", "treshold": 1})


# ---- Bad input ----


def test_a_reward_that_cannot_work_is_found_before_training(make):
    def missing(prompts, images, **columns):
        return [0.0] * (len(images) - 1)

    def broken(prompts, images, **columns):
        raise KeyError("weights")

    for reward, message in (
        (missing, "`missing` returned 1 scores for 2"),
        (broken, "`broken` failed on two grey .* KeyError"),
    ):
        trainer = make([redness, reward], pipe=build_pipeline())
        trainer.policy.encode = None  # nothing may be sampled
        with pytest.raises(RewardError, match=message):
            trainer.train()


def test_an_error_in_mid_training_loses_nothing(make, tmp_path):
    calls = []

    def fails_later(prompts, images, **columns):
        calls.append(len(images))
        return redness(prompts, images)[: None if len(calls) < 4 else -1]

    # An older run's checkpoint of that name is no reason not to save this one's.
    make(pipe=build_pipeline(), max_steps=4, seed=1, save_strategy="steps", save_steps=4).train()
    trainer = make(fails_later, pipe=build_pipeline(), max_steps=8)
    with pytest.raises(RewardError, match="`fails_later` returned 7 scores for 8 images") as caught:
        trainer.train()
    checkpoint = str(tmp_path / "output" / "checkpoint-4")
    assert checkpoint in caught.value.__notes__[0] and "4 optimizer steps" in caught.value.__notes__[0]
    assert os.path.exists(os.path.join(checkpoint, "pytorch_lora_weights.safetensors"))
    mended = make(pipe=build_pipeline(), max_steps=8)
    mended.train(resume_from_checkpoint=checkpoint)
    straight = make(pipe=build_pipeline(), max_steps=8)
    straight.train()
    assert_same(trained(mended), trained(straight))


def test_an_interruption_loses_nothing_either(make, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = make(callbacks=[Interrupt()], max_steps=8)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # In mid-iteration: its images are sampled again.
    again = make(pipe=build_pipeline(), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-3"))
    assert again.state.global_step == 8
    trainer.remove_callback(Interrupt)
    trainer.train()  # and the interrupted trainer is still good
    assert trainer.state.global_step == 8


def test_unscored_images_are_masked_and_counted(make):
    def half(prompts, images, **columns):
        scores = redness(prompts, images)
        return [None, math.nan, *scores[2:]] if len(images) == 8 else scores

    trainer = make(half, max_steps=2)
    trainer.train()
    assert logged(trainer, "rewards/half/failed") == [2.0]
    assert (trainer._rollout.advantages == 0).tolist() == [True, True] + [False] * 6
    assert math.isfinite(logged(trainer, "reward")[0])


def test_a_reward_that_raises_now_and_then_costs_its_images_alone(make):
    calls = []

    def moody(prompts, images, **columns):
        calls.append(len(images))
        if calls[1:] and (len(images) == 8 or calls[-2] == 8):  # the batch, and then its first image alone
            raise ConnectionError("try later")
        return redness(prompts, images)

    trainer = make(moody, max_steps=2)
    trainer.train()
    assert calls == [2, 8] + [1] * 8
    assert logged(trainer, "rewards/moody/failed") == [1.0]
    assert trainer.state.global_step == 2 and trainer._rollout.advantages[0] == 0
    assert (trainer._rollout.advantages[1:] != 0).all()


def test_asynchronous_rewards_begin_while_the_next_prompt_is_sampled(make):
    events = []

    async def later(prompts, images, **columns):
        events.append("asked")
        return redness(prompts, images)

    trainer = make([later, redness], max_steps=2, sample_batch_size=4)
    decode = trainer.policy.decode

    def decode_and_note(latents, batch_size=None):
        events.append("decoded")
        return decode(latents, batch_size)

    trainer.policy.decode = decode_and_note
    trainer.train()
    assert events == ["asked", "decoded", "asked", "decoded", "asked"]  # the first is the trial before training
    assert logged(trainer, "rewards/later/mean") == logged(trainer, "rewards/redness/mean")


def test_models_of_rewards_move(make):
    class Model:
        places = []

        def to(self, device):
            self.places.append(str(device))

        def __call__(self, prompts, images, **columns):
            return redness(prompts, images)

    make(Model(), max_steps=2).train()
    assert Model.places == ["cpu"]
    Model.places.clear()
    make(Model(), pipe=build_pipeline(), max_steps=2, offload_rewards=True).train()
    assert Model.places == ["cpu", "cpu"] * 2  # to the device and back: the trial, and one iteration


def test_rewards_by_name(make, tmp_path):
    (tmp_path / "mine.py").write_text("def greenness(prompts, images, **columns):\n    return [0.5] * len(images)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        trainer = make(["jpeg_compressibility", "mine:greenness"], max_steps=2)
    assert trainer.reward_names == ["jpeg_compressibility", "greenness"]
    trainer.train()
    assert logged(trainer, "rewards/jpeg_compressibility/mean")[0] < 0
    (tmp_path / "theirs.py").write_text(
        "class Constant:\n"
        "    def __init__(self, value=0.0):\n        self.value = value\n"
        "    def __call__(self, prompts, images, **columns):\n        return [self.value] * len(images)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        trainer = make(
            "theirs:Constant", pipe=build_pipeline(), reward_init_kwargs={"theirs:Constant": {"value": 3.0}}
        )
        assert trainer.reward_funcs[0].value == 3.0
        with pytest.raises(ValueError, match="'mine:greenness' is a function and takes no arguments"):
            make("mine:greenness", pipe=build_pipeline(), reward_init_kwargs={"mine:greenness": {"value": 3.0}})
        with pytest.raises(ValueError, match="`reward_init_kwargs` is for hpsv2, not among"):
            make("mine:greenness", pipe=build_pipeline(), reward_init_kwargs={"hpsv2": {}})
    with pytest.raises(ValueError, match="there is no reward 'hps'. Give one of hpsv2, pickscore"):
        make("hps", pipe=build_pipeline())


def test_too_many_failures_stop_the_run(make):
    def never(prompts, images, **columns):
        return [None] * len(images)

    with pytest.raises(RewardError, match="`never` could not score 100% of the 8 images of iteration 0.*=0.5"):
        make([redness, never]).train()
    trainer = make([redness, never], pipe=build_pipeline(), max_reward_failure_rate=1.0, reward_weights=[1.0, 0.0])
    trainer.train()
    assert trainer.state.global_step == 4


def test_errors_of_the_constructor(make, tmp_path, tiny_pipe):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make(train_dataset=[])
    with pytest.raises(ValueError, match=r"`eval_dataset` must have a column 'prompt'.*\['text'\]"):
        make(eval_dataset={"a": PROMPTS, "b": [{"text": "a"}]})
    with pytest.raises(ValueError, match="got 2 weights for 1 reward function"):
        make(reward_weights=[1.0, 2.0])
    with pytest.raises(TypeError, match="`reward_funcs` must be"):
        make([3])
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 4 .*got 34. Use 32 or 36"):
        make(height=34)
    with pytest.raises(FileNotFoundError, match="'no/such/pipeline'.*there is no such folder"):
        make(pipe="no/such/pipeline")
    with pytest.raises(TypeError, match="must be a diffusers FluxPipeline, got FluxTransformer2DModel"):
        make(pipe=tiny_pipe.transformer)
    with pytest.raises(ValueError, match="sde_type"):
        make(sde_type="langevin")
    with pytest.raises(ValueError, match="eta"):
        make(eta=-1.0)
    with pytest.raises(ValueError, match="suffix_ratio"):
        make(suffix_ratio=0.0)
    with pytest.raises(ValueError, match="`train_dataset` is None"):
        make(train_dataset=None).train()
    with pytest.raises(ValueError, match=r"has the adapter\(s\) \['default'\] already. Leave out `peft_config`"):
        make()
    with pytest.raises(ValueError, match="`eval_dataset` is None"):
        make(pipe=build_pipeline()).evaluate()
    tiny_pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="may not be a flow velocity"):
        make(lora=False)


def test_a_lora_of_another_shape_cannot_be_resumed(make, tmp_path):
    make(pipe=build_pipeline(), max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    for other in (LoraConfig(r=8), LoraConfig(r=4, target_modules=["to_q"])):
        with pytest.raises(ValueError, match="has other layers or another rank than this trainer's"):
            make(pipe=build_pipeline(), peft_config=other).train(resume_from_checkpoint=checkpoint)


def test_the_seed_draws_the_lora(make):
    weights = []
    for seed, noise in ((1, 2), (1, 3), (2, 3)):
        pipe = build_pipeline()
        torch.manual_seed(noise)
        weights.append(trained(make(pipe=pipe, seed=seed)))
    assert_same(weights[0], weights[1])
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_precision_of_a_loaded_pipeline(make, pipeline_folder):
    trainer = make(pipe=pipeline_folder, model_init_kwargs={"torch_dtype": "float64"})
    assert trainer.pipe.vae.dtype == torch.float64
    trainer = make(pipe=pipeline_folder)
    assert {p.dtype for p in trainer.pipe.transformer.parameters()} == {torch.float32}


def test_the_users_lora_config_is_left_alone(make):
    peft_config = LoraConfig(r=2)
    trainer = make(peft_config=copy.deepcopy(peft_config))
    assert "attn.to_add_out" in trainer.pipe.transformer.peft_config["default"].target_modules
    assert peft_config.target_modules is None
