"""The self-check before training, against what a run then shows."""

import random

import numpy as np
import pytest
import torch
from helpers import PROMPTS, assert_same, logged, make_trainer, trained
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from diffusers_mixgrpo.training.memory import tensor_bytes
from diffusers_mixgrpo.training.preflight import preflight


WHOLE = {"per_device_train_batch_size": 8, "steps_per_generation": 1, "max_steps": 2}  # 1 optimizer step an iteration


@pytest.fixture
def make(tmp_path):
    """
    A trainer of a new pipeline: two prompts with four images each per iteration, two optimizer steps in each.

    There are two iterations, with a window of two at the steps 0 and 1 of four.
    """

    def make(lora=True, **changes):
        lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian") if lora else False
        return make_trainer(tmp_path, lora=lora, **({"num_inference_steps": 4} | changes))

    return make


def parameters(trainer):
    return trainer.engine.trained_parameters


# ---- Batches ----


def test_the_papers_batches_in_words(make):
    batches = {"per_device_train_batch_size": 3, "steps_per_generation": 4, "num_generations": 12}
    text = str(make(**batches, max_steps=8).preflight())
    assert "12 images of 1 prompt per device, 4 optimizer steps per iteration" in text
    assert "3 images x 2 window steps = 6 transitions per device, up to 6 in one pass" in text
    assert "the run: 2 iterations = 8 optimizer steps = 0.4 epochs over 5 prompts" in text
    assert "the window visits steps 0-2 of 0-3" in text


@pytest.mark.parametrize("kwargs", [{"max_steps": -1, "num_train_epochs": 1}, {"gradient_accumulation_steps": 2}])
def test_the_run_is_as_long_as_was_said(make, kwargs):
    trainer = make(**kwargs)
    report = trainer.preflight()
    trainer.train()
    steps, epochs = trainer.state.global_step, trainer.state.epoch
    assert len(logged(trainer, "iteration")) == report.iterations
    assert f"{report.iterations} iterations = {steps} optimizer steps = {epochs:.3g} epochs" in str(report)


# ---- NFE ----


@pytest.mark.parametrize(
    "kwargs, backward",
    [
        ({}, 1),
        ({"lora": False}, 2),
        ({"gradient_checkpointing": True}, 2),
        ({"lora": False, "gradient_checkpointing": True}, 3),
    ],
)
def test_nfe_by_hand(make, kwargs, backward):
    report = make(**kwargs).preflight()
    # Starts 0 and 1 of a window of 2 in 4 steps; 2 prompts, 8 images
    assert report.nfe == {
        "prefix": pytest.approx(2 * 0.5),
        "window": pytest.approx(8 * 2),
        "suffix": pytest.approx(8 * (4 - 2 - 0.5)),
        "replay forward": 8 * 2,
        "replay backward": 8 * 2 * backward,
    }
    assert report.nfe_per_image == pytest.approx(4)
    text = str(report)
    for passes in report.nfe.values():
        assert f"{passes:.5g}" in text and f"{passes / sum(report.nfe.values()):.1%}" in text


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"shared_noise": False, "window_strategy": "random"},
        {"sample_batch_size": 3, "window_size": 1},
        {"prefix_ratio": 0.5, "suffix_ratio": 0.4, "ode_solver": "dpmsolver++", "num_inference_steps": 7},
        {"num_iterations": 2, "max_steps": 8, "window_train_fraction": 0.5, "replay_batch_size": 3},
        {"beta": 0.1, "window_strategy": "frozen", "window_start": 1},
        {"replay_top_k": 1, **WHOLE},
        {"reuse_rollout_graph": True, **WHOLE},
    ],
)
def test_a_run_takes_the_passes_that_were_counted(make, kwargs):
    trainer = make(**kwargs)
    report = trainer.preflight()
    passes = {True: 0, False: 0}

    def count(module, args, kwargs):
        passes[torch.is_grad_enabled()] += len(kwargs["hidden_states"])

    trainer.pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert np.mean(logged(trainer, "nfe_amortized")) == pytest.approx(report.nfe_amortized)
    assert np.mean(logged(trainer, "nfe")) == pytest.approx(report.nfe_per_image)
    with_graph = "window" if trainer.args.reuse_rollout_graph else "replay forward"
    assert passes[True] == pytest.approx(2 * report.nfe[with_graph])
    assert sum(passes.values()) == pytest.approx(2 * (sum(report.nfe.values()) - report.nfe["replay backward"]))


# ---- Memory ----


@pytest.mark.parametrize("lora", [True, False])
def test_memory_of_the_weights(make, lora):
    trainer = make(lora=lora, beta=0.1, max_steps=2)
    memory = trainer.preflight().memory
    transformer = trainer.pipe.transformer
    assert memory["LoRA" if lora else "trained weights"] == memory["gradients"] == tensor_bytes(parameters(trainer))
    assert memory["frozen weights"] == tensor_bytes(p for p in transformer.parameters() if not p.requires_grad)
    assert memory["vae"] == tensor_bytes(trainer.pipe.vae.parameters())
    assert memory.get("reference") == (None if lora else tensor_bytes(transformer.parameters()))
    trainer.train()
    trajectory = trainer.rollout.trajectory
    kept = [trajectory.states, trajectory.log_probs, trajectory.latents]
    assert memory["rollout"] == tensor_bytes([*kept, trainer.rollout.reference_means])


@pytest.mark.parametrize("optim, copies", [("adamw_torch_fused", 2), ("sgd", 0), ("adagrad", 1), ("own", 1)])
def test_memory_of_the_optimizer(make, optim, copies):
    trainer = make(max_steps=2) if optim == "own" else make(optim=optim, max_steps=2)
    if optim == "own":
        trainer.optimizer = torch.optim.SGD(parameters(trainer), lr=1e-3, momentum=0.9)
    said = trainer.preflight().memory["optimizer"]
    trainer.train()
    states = trainer.optimizer.state.values()
    held = tensor_bytes(
        value for state in states for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    assert said == held == copies * tensor_bytes(parameters(trainer))


def test_an_optimizer_that_cannot_be_tried_is_unknown(make):
    trainer = make()
    trainer.args.optim_target_modules = ["to_q"]
    trainer.args.optim = "galore_adamw"  # which the configuration refuses where its package is missing
    report = trainer.preflight()
    assert report.memory["optimizer"] is report.memory_peak is None
    assert "unknown" in str(report)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"beta": 0.1},
        {"lora": False},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"lora": False, "replay_batch_size": 4},
    ],
)
def test_activations_are_what_the_allocator_sees_in_training(make, kwargs):
    trainer = make(**kwargs, max_steps=2)
    report = trainer.preflight()
    trainer.train()
    trainer.model.zero_grad()
    images = trainer.rollout.training_batches(4)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.engine.backward(trainer.rollout, images, trainer.model_wrapped, kwargs.get("replay_batch_size"))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert report.memory["activations"] + report.memory["gradients"] == pytest.approx(live.max(), rel=0.05)


def test_the_kl_term_is_measured_too(make, monkeypatch):
    """Its reference passes, the means that it keeps, and each forward and backward pass with the term itself."""
    without = make().preflight()
    trainer = make(beta=0.1)
    objectives = []
    compute = trainer.engine.objective

    def objective(*args, **kwargs):
        objectives.append(compute(*args, **kwargs))
        return objectives[-1]

    monkeypatch.setattr(trainer.engine, "objective", objective)
    report = trainer.preflight()
    assert objectives and all("kl" in objective.statistics for objective in objectives)
    assert report.nfe["reference"] == 8 * 2 and "reference" not in without.nfe
    means = 16 * 64 * 16 * 4  # transitions, tokens, numbers of each, bytes of a number
    assert report.memory["rollout"] == without.memory["rollout"] + means


def test_activations_grow_with_the_replay_batch(make):
    two, eight = (make(replay_batch_size=n).preflight().memory["activations"] for n in (2, 8))
    assert eight == pytest.approx(4 * two, rel=0.2)


def test_a_kept_graph_holds_all_activations(make):
    replayed = make(**WHOLE).preflight()
    kept = make(**WHOLE, reuse_rollout_graph=True).preflight()
    assert kept.memory["activations"] == pytest.approx(replayed.memory["activations"], rel=0.2)


# ---- Time ----


@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 2, "max_steps": 2, "beta": 0.1}])
def test_time(make, monkeypatch, kwargs):
    """By a clock that a pass of one image through the transformer moves by 1 s, and one through the VAE by 10 s."""
    trainer = make(**kwargs)
    now = 0.0

    def clock(seconds):
        def move(module, args, output):
            nonlocal now
            now += seconds * len(output[0] if isinstance(output, tuple) else output)

        return move

    trainer.pipe.transformer.register_forward_hook(clock(1.0))
    trainer.pipe.vae.decoder.register_forward_hook(clock(10.0))
    monkeypatch.setattr("time.perf_counter", lambda: now)
    report = trainer.preflight()
    assert f"{report.seconds_per_iteration * 2 / 60:.2f} min" in str(report)
    trainer.train()
    for part in ("sampling", "decoding", "training"):
        assert report.seconds[part] == pytest.approx(np.mean(logged(trainer, f"time/{part}"))), part
    sampled = sum(report.nfe[part] for part in ("prefix", "window", "suffix")) + report.nfe.get("reference", 0)
    assert report.seconds["sampling"] == pytest.approx(sampled)
    assert report.seconds["decoding"] == 10 * 8 and report.seconds["training"] == 8 * 2


# ---- The ratio ----


def test_the_ratio_in_float32(make):
    ratio = make(replay_batch_size=3).preflight().ratio
    assert ratio.max_deviation < 1e-4 and ratio.float32 is None and ratio.precision == "float32 weights"
    assert "fine" in str(ratio)


def disturb(trainer, by):
    """Let the transformer's output be larger by the share `by(output)`."""
    trainer.pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: output * (1 + by(output)))


def by_size(output):
    return 1e-2 * len(output)


def under_autocast(output):
    return 1e-2 * len(output) if torch.is_autocast_enabled("cpu") else 0.0


def by_chance(output):
    return 0.1 * torch.randn_like(output)


@pytest.mark.parametrize(
    "by, bf16, cause",
    [
        (by_size, False, "with float32 weights: "),
        (by_size, True, "with bf16 autocast: "),
        (under_autocast, True, "bf16 autocast: "),
        (by_chance, False, "the forward pass is not deterministic"),
    ],
)
def test_what_makes_the_ratio_differ_from_1(make, by, bf16, cause):
    trainer = make(bf16=bf16, shared_noise=bf16, replay_batch_size=3, max_steps=2)
    disturb(trainer, by)
    report = trainer.preflight()
    assert cause in report.ratio.cause and f"cause: {report.ratio.cause}" in str(report)
    if by is by_chance:
        return
    assert "batch shape (sampled 8 at once, replayed " in report.ratio.cause
    assert report.ratio.same_batch == 0
    if bf16:  # float32 does not have the disturbance, or has it too
        assert (report.ratio.float32 < report.ratio.max_deviation / 10) == (by is under_autocast)
    trainer.train()
    shown = logged(trainer, "ratio/on_policy_max_deviation")[0]
    assert report.ratio.max_deviation == pytest.approx(shown, rel=1e-5) and shown > 1e-5


def test_batches_of_one_size_bring_the_ratio_to_1(make):
    trainer = make(replay_batch_size=3, epsilon=1e-4)
    disturb(trainer, by_size)
    report = trainer.preflight()
    assert report.ratio.share > 0.1
    assert any("sample_batch_size=3, replay_batch_size=3" in warning for warning in report.warnings)
    trainer = make(replay_batch_size=4, sample_batch_size=4, epsilon=1e-4)
    disturb(trainer, by_size)
    assert trainer.preflight().ratio.max_deviation == 0


# ---- Warnings ----


def test_warnings(make):
    report = make().preflight()
    assert report.warnings == [] and "Warnings\n  none" in str(report)
    (warning,) = make(epsilon=1e-4).preflight().warnings
    assert "epsilon=0.0001 is 0.1 nats over the 1024 elements" in warning
    assert "nearly every update will be clipped. Use epsilon=1.3e-02" in warning
    (warning,) = make(max_steps=2).preflight().warnings  # one iteration of a sweep of two
    assert "takes 2 iterations" in warning and "window_interval=1" in warning


def test_no_prompts(make):
    with pytest.raises(ValueError, match="`train_dataset` must have rows with a 'prompt', got None"):
        make(train_dataset=None).preflight()


# ---- Nothing is left behind ----


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora": False, "gradient_checkpointing": True, "beta": 0.1},
        {"bf16": True, "gradient_accumulation_steps": 2, "max_steps": 2, "ode_solver": "dpmsolver++"},
        {"reuse_rollout_graph": True, **WHOLE},
    ],
)
def test_a_run_is_the_same_without(make, kwargs):
    runs = []
    for check in (False, True):
        trainer = make(**kwargs)
        if check:
            trainer.preflight()
        trainer.train()
        log = [
            {name: value for name, value in entry.items() if not name.startswith(("time/", "train_"))}
            for entry in trainer.state.log_history
        ]
        runs.append((trained(trainer), log))
    (weights, log), (weights_after_check, log_after_check) = runs
    assert_same(weights, weights_after_check)
    assert log == log_after_check


def test_the_engine_is_left_as_it_was(make):
    trainer = make(gradient_checkpointing=True)
    disturb(trainer, by_chance)  # draws from the global random state
    engine = trainer.engine
    transformer = trainer.pipe.transformer
    weights = [p.clone() for p in transformer.parameters()]
    first = parameters(trainer)[0]
    gradient = first.grad = torch.ones_like(first)
    scheduler, timer = engine.scheduler, engine.timer
    config, state = dict(scheduler.config), torch.get_rng_state()
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    preflight(engine, PROMPTS)
    assert first.grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for p in transformer.parameters() if p.grad is not gradient)
    assert all(torch.equal(p, old) for p, old in zip(transformer.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state
    assert not transformer.is_gradient_checkpointing
    assert engine.scheduler is scheduler and dict(scheduler.config) == config
    assert scheduler.num_inference_steps is None
    assert engine.timer is timer and timer.seconds == {}
    assert trainer.optimizer is None and trainer.rollout is None
    assert trainer.state.log_history == [] and trainer.metrics.pop() == {}


def test_an_error_leaves_nothing_behind_either(make, monkeypatch):
    trainer = make(gradient_checkpointing=True)
    scheduler = trainer.engine.scheduler
    monkeypatch.setattr(trainer.engine.policy, "decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.preflight()
    assert not trainer.pipe.transformer.is_gradient_checkpointing
    assert all(p.grad is None for p in trainer.pipe.transformer.parameters())
    assert trainer.engine.scheduler is scheduler


def test_a_check_after_some_training(make):
    """It is about the weights as they are, and says the same of the batches."""
    trainer = make(bf16=True, max_steps=2)
    before = trainer.preflight()
    trainer.train()
    after = trainer.preflight()
    assert after.batch == before.batch and after.nfe == before.nfe and after.memory == before.memory
    assert after.ratio.max_deviation < 1e-3
