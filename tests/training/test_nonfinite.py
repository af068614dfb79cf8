"""Infinite and NaN numbers: never in the weights, counted, and reported with prompt and step."""

import math

import pytest
import torch
from helpers import PROMPTS, assert_same, logged, make_trainer, trained
from torch import nn
from transformers import TrainerCallback

from diffusers_mixgrpo import RewardError
from diffusers_mixgrpo.training.nonfinite import NonFiniteError, NonFiniteSteps, finite_weights, gradient_norm


# ---- Pieces ----


@pytest.mark.parametrize("value, finite", [(1e38, True), (-1e38, True), (math.inf, False), (math.nan, False)])
def test_finite(value, finite):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor([1.0, value])), nn.Parameter(torch.empty(0))]
    assert finite_weights(parameters) == finite


@pytest.mark.parametrize("value, norm", [(4.0, 5.0), (1e18, 1e18), (math.inf, math.inf), (math.nan, math.nan)])
def test_gradient_norm(value, norm):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(0))]
    assert gradient_norm(parameters) is None  # there is no gradient
    parameters[0].grad = torch.tensor([0.0, value, 0.0])
    parameters[1].grad = torch.tensor([3.0, 0.0])
    assert gradient_norm(parameters) == pytest.approx(norm, rel=1e-6, nan_ok=True)


def test_steps_in_a_row():
    steps = NonFiniteSteps(limit=3)
    for is_finite in (False, False, True, False, False):
        steps.count(is_finite, step=0)
    with pytest.raises(NonFiniteError, match="in 3 optimizer steps in a row, up to step 8"):
        steps.count(False, step=7)


def test_images_that_are_not_finite_are_replaced(shared_pipe):
    """By copies of finite ones, with their own prompts, so that all can be decoded and replayed."""
    from diffusers_mixgrpo import MixedODESDEScheduler, sample_trajectories
    from diffusers_mixgrpo.policies.flux import FluxPolicy

    policy = FluxPolicy(shared_pipe, height=32, width=32, num_inference_steps=3, max_sequence_length=12)
    scheduler = MixedODESDEScheduler.from_config(shared_pipe.scheduler.config, window_start=0, window_size=2)
    conditioning = policy.encode(["a cat", "a dog"])
    whole = sample_trajectories(policy, scheduler, conditioning, policy.initial_latents([1, 2]), num_generations=2)
    for name, index in (("states", (0, 1)), ("log_probs", (3, 0)), ("latents", (1, 0))):
        getattr(whole, name)[index] = math.nan
    replaced, finite = whole.without_nonfinite()
    assert finite.tolist() == [False, False, True, False]
    assert replaced.prompt_indices.tolist() == [1, 1, 1, 1]
    for image in range(4):
        assert torch.equal(replaced.states[image], whole.states[2])
        assert torch.equal(replaced.latents[image], whole.latents[2])
    whole.states[2] = math.inf
    nothing, finite = whole.without_nonfinite()
    assert not finite.any() and all(t.isfinite().all() for t in (nothing.states, nothing.log_probs, nothing.latents))


# ---- Training ----


class Break(nn.Module):
    """Makes the transformer's output NaN or infinite in some calls; `when(call, has_gradient)` says in which."""

    def __init__(self, transformer, when, value=math.nan, rows=slice(None)):
        super().__init__()
        self.calls = 0
        self.when = when
        self.value = value
        self.rows = rows
        transformer.proj_out.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        self.calls += 1
        if self.when(self.calls, torch.is_grad_enabled()):
            output = output.clone()
            output[self.rows] = output[self.rows] + self.value
        return output


@pytest.fixture
def make(tmp_path):
    return lambda **kwargs: make_trainer(tmp_path / "output", **kwargs)


@pytest.mark.parametrize("lora, beta", [(True, 0.1), (False, 0)])
def test_a_rollout_pass_that_is_not_finite(make, caplog, lora, beta):
    """Its images are left out, as if no reward could score them, and the others are trained."""
    trainer = make(lora=lora, beta=beta, max_steps=2, sample_batch_size=4, max_reward_failure_rate=0.0)
    before = trained(trainer)
    Break(trainer.pipe.transformer, lambda call, has_gradient: call == 1)
    trainer.train()
    assert logged(trainer, "nonfinite/images") == [4]
    assert logged(trainer, "nonfinite/steps") == [0, 0]
    assert "Step 0: 4 images of iteration 0 were infinite or NaN" in caplog.text
    assert math.isfinite(logged(trainer, "reward")[0])
    assert trainer.rollout.advantages[:4].tolist() == [0] * 4 and trainer.rollout.advantages[4:].abs().min() > 0
    after = trained(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(
    "value, optim", [(math.nan, "adamw_torch"), (math.inf, "adamw_torch_fused"), (math.nan, "sgd")]
)
def test_a_replay_that_is_not_finite(make, caplog, value, optim):
    """The optimizer step is dropped: weights and optimizer are those before it. The next one goes on."""
    trainer = make(optim=optim)
    weights = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = trained(trainer)

    trainer.add_callback(Keep())
    passes = []

    def second_replay(call, has_gradient):
        passes.append(has_gradient)
        return has_gradient and sum(passes) == 2

    Break(trainer.pipe.transformer, second_replay, value, rows=slice(0, 1))
    trainer.train()
    assert logged(trainer, "nonfinite/steps") == [0, 1, 0, 0]
    assert_same(weights[2], weights[1])
    assert any(not torch.equal(weights[3][name], value) for name, value in weights[2].items())
    assert all(value.isfinite().all() for value in weights[4].values())
    culprits = [row["prompt"] for row in PROMPTS if f"losses of the prompts ['{row['prompt']}']" in caplog.text]
    assert "Step 1: the gradient was infinite or NaN" in caplog.text and len(culprits) == 1
    states = trainer.optimizer.state.values()
    assert all(value.isfinite().all() for state in states for value in state.values() if torch.is_tensor(value))


def test_one_infinite_gradient(make, caplog):
    """Of finite losses: only the gradient shows it."""
    trainer = make(max_steps=2)
    before = trained(trainer)
    parameter = trainer.engine.trained_parameters[0]
    parameter.register_hook(lambda gradient: gradient + torch.tensor(math.inf))
    trainer.train()
    assert_same(trained(trainer), before)
    assert "from finite losses on this process" in caplog.text


def test_after_too_many_in_a_row_the_last_finite_checkpoint_stays(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=2, max_steps=20, max_nonfinite_steps=3, save_total_limit=1)
    Break(trainer.pipe.transformer, lambda call, has_gradient: has_gradient and trainer.state.global_step >= 4)
    with pytest.raises(NonFiniteError, match="in 3 optimizer steps in a row, up to step 7"):
        trainer.train()
    resumed = make(max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert all(value.isfinite().all() for value in trained(resumed).values())


def test_rollouts_without_one_finite_image_stop_the_run(make):
    trainer = make(max_nonfinite_steps=4, max_steps=20)
    before = trained(trainer)
    Break(trainer.pipe.transformer, lambda call, has_gradient: True)
    with pytest.raises((NonFiniteError, RewardError)):
        trainer.train()
    assert trainer.state.global_step < 5
    assert_same(trained(trainer), before)


@pytest.mark.parametrize("lora", [True, False])
def test_weights_that_are_not_finite_are_not_saved(make, tmp_path, lora):
    """For example after an optimizer's overflow, which no gradient shows beforehand."""
    trainer = make(lora=lora, save_strategy="steps", save_steps=2, save_total_limit=1)

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.engine.trained_parameters[0].data.fill_(math.inf)

    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteError, match="The weights are infinite or NaN after 4 optimizer steps"):
        trainer.train()
    assert [path.name for path in (tmp_path / "output").glob("checkpoint*")] == ["checkpoint-2"]


def test_the_scaler_of_fp16_keeps_its_work(make):
    """It drops the step and halves its scale; accelerate has none on a CPU, so this one is put in its place."""
    trainer = make(max_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.accelerator.scaler = scaler
    parameter = trainer.engine.trained_parameters[0]
    spoil = [True, False, False, False]
    parameter.register_hook(lambda gradient: gradient + (math.inf if spoil.pop(0) else 0.0))
    weights = {0: trained(trainer)}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights[state.global_step] = trained(trainer)

    trainer.add_callback(Keep())
    trainer.train()
    assert logged(trainer, "nonfinite/steps") == [1, 0, 0, 0]
    assert_same(weights[1], weights[0])
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[1].items())
    assert scaler.get_scale() == 2.0**7
