"""The self-check before training, against what a run then shows."""

import random

import numpy as np
import pytest
import torch
from conftest import redness
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from diffusers_mixgrpo import MixGRPOConfig, MixGRPOTrainer
from diffusers_mixgrpo.preflight import preflight


PROMPTS = [{"prompt": text} for text in ("a cat", "two dogs", "sea", "red", "blue tree")]


@pytest.fixture
def make(tmp_path, tiny_pipe):
    """A trainer of two prompts with four images each per iteration, two optimizer steps in each, three iterations."""

    def make(lora=True, train_dataset=PROMPTS, optimizers=(None, None), **kwargs):
        if hasattr(tiny_pipe.transformer, "peft_config"):
            tiny_pipe.transformer.delete_adapters("default")
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
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        peft_config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian") if lora else None
        args = MixGRPOConfig(**(config | kwargs))
        return MixGRPOTrainer(tiny_pipe, redness, args, train_dataset, peft_config=peft_config, optimizers=optimizers)

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(trainer):
    return [p for p in trainer.pipe.transformer.parameters() if p.requires_grad]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- Batches ----


def test_the_papers_batches_in_words(make):
    batches = {"per_device_train_batch_size": 3, "steps_per_generation": 4, "num_generations": 12}
    text = str(preflight(make(**batches, max_steps=8)))
    assert "12 images of 1 prompt per device, 4 optimizer steps per iteration" in text
    assert "3 images x 2 window steps = 6 transitions per device, up to 6 in one pass" in text
    assert "the run: 2 iterations = 8 optimizer steps = 0.4 epochs over 5 prompts" in text
    assert "the window comes to steps 0-2 of 0-4" in text


@pytest.mark.parametrize("kwargs", [{"max_steps": -1, "num_train_epochs": 2}, {"gradient_accumulation_steps": 2}])
def test_the_run_is_as_long_as_was_said(make, kwargs):
    trainer = make(**kwargs)
    report = preflight(trainer)
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
    report = preflight(make(**kwargs))
    # Starts 0, 1, 2 of a window of 2 in 5 steps; 2 prompts, 8 images
    assert report.nfe == {
        "prefix": pytest.approx(2 * 1),
        "window": pytest.approx(8 * 2),
        "suffix": pytest.approx(8 * (5 - 2 - 1)),
        "replay forward": 8 * 2,
        "replay backward": 8 * 2 * backward,
    }
    assert report.nfe_per_image == pytest.approx(5)
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
        {"num_iterations": 2, "max_steps": 12, "window_train_fraction": 0.5, "replay_batch_size": 3},
        {"beta": 0.1, "window_strategy": "frozen", "window_start": 1},
        {"replay_top_k": 1, "steps_per_generation": 1, "per_device_train_batch_size": 8, "max_steps": 3},
        {"reuse_rollout_graph": True, "steps_per_generation": 1, "per_device_train_batch_size": 8, "max_steps": 3},
    ],
)
def test_a_run_takes_the_passes_that_were_counted(make, kwargs):
    trainer = make(**kwargs)
    report, passes = preflight(trainer), {True: 0, False: 0}

    def count(module, args, kwargs):
        passes[torch.is_grad_enabled()] += len(kwargs["hidden_states"])

    trainer.pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert np.mean(logged(trainer, "nfe_amortized")) == pytest.approx(report.nfe_amortized)
    assert np.mean(logged(trainer, "nfe")) == pytest.approx(report.nfe_per_image)
    with_graph = "window" if trainer.args.reuse_rollout_graph else "replay forward"
    assert passes[True] == pytest.approx(3 * report.nfe[with_graph])
    assert sum(passes.values()) == pytest.approx(3 * (sum(report.nfe.values()) - report.nfe["replay backward"]))


# ---- Memory ----


@pytest.mark.parametrize("lora", [True, False])
def test_memory_of_the_weights(make, lora):
    trainer = make(lora=lora, beta=0.1)
    memory, transformer = preflight(trainer).memory, trainer.pipe.transformer
    assert memory["LoRA" if lora else "trained weights"] == memory["gradients"] == size(trained(trainer)) > 0
    assert memory["frozen weights"] == size(p for p in transformer.parameters() if not p.requires_grad)
    assert memory["vae"] == size(trainer.pipe.vae.parameters())
    assert memory.get("reference") == (None if lora else size(transformer.parameters()))
    trainer.train()
    rollout = trainer._rollout
    kept = [rollout.trajectory.states, rollout.trajectory.log_probs, rollout.trajectory.latents]
    assert memory["rollout"] == size([*kept, rollout.reference_means])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adagrad", "own"])
def test_memory_of_the_optimizer(make, optim):
    own = (None, None)
    if optim == "own":
        trainer = make()
        own = torch.optim.SGD(trained(trainer), lr=1e-3, momentum=0.9), None
        trainer.optimizer = own[0]
    else:
        trainer = make(optim=optim)
    said = preflight(trainer).memory["optimizer"]
    trainer.train()
    states = trainer.optimizer.state.values()
    held = size(v for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.numel() > 1)
    assert said == held == {"adamw_torch_fused": 2, "sgd": 0, "adagrad": 1, "own": 1}[optim] * size(trained(trainer))


def test_an_optimizer_that_cannot_be_tried_is_unknown(make):
    report = preflight(make(optim="galore_adamw", optim_target_modules=["to_q"]))
    assert report.memory["optimizer"] is report.memory_peak is None
    assert "unknown" in str(report)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora": False},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"lora": False, "replay_batch_size": 4},
    ],
)
def test_activations_are_what_the_allocator_sees_in_training(make, kwargs):
    trainer = make(**kwargs, max_steps=2)
    report = preflight(trainer)
    trainer.train()
    trainer.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer._forward_backward(trainer.model_wrapped, trainer._rollout.order[:4], True)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert report.memory["activations"] + report.memory["gradients"] == pytest.approx(live.max(), rel=0.05)


def test_activations_grow_with_the_replay_batch(make):
    two, four, eight = (preflight(make(replay_batch_size=n)).memory["activations"] for n in (2, 4, 8))
    assert four == pytest.approx(2 * two, rel=0.2)
    assert eight == pytest.approx(4 * two, rel=0.2)


def test_a_kept_graph_holds_all_activations(make):
    whole = {"steps_per_generation": 1, "per_device_train_batch_size": 8, "max_steps": 3}
    replayed = preflight(make(**whole))
    kept = preflight(make(**whole, reuse_rollout_graph=True))
    assert kept.memory["activations"] == pytest.approx(replayed.memory["activations"], rel=0.2)


# ---- Time ----


@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 2, "max_steps": 3, "beta": 0.1}])
def test_time(make, monkeypatch, kwargs):
    """By a clock that a pass of one image through the transformer moves on by 1 s, and one through the VAE by 10 s."""
    now, trainer = [0.0], make(**kwargs)

    def clock(seconds):
        return lambda module, args, output: now.__setitem__(0, now[0] + seconds * len(output[0]))

    trainer.pipe.transformer.register_forward_hook(clock(1.0))
    trainer.pipe.vae.decoder.register_forward_hook(lambda module, args, output: clock(10.0)(module, args, (output,)))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    report = preflight(trainer)
    assert f"{report.seconds_per_iteration * 3 / 60:.2f} min" in str(report)
    trainer.train()
    for part in ("sampling", "decoding", "training"):
        assert report.seconds[part] == pytest.approx(np.mean(logged(trainer, f"time/{part}"))), part
    assert report.seconds["decoding"] == 10 * 8 and report.seconds["training"] == 8 * 2


# ---- The ratio ----


def test_the_ratio_in_float32(make):
    ratio = preflight(make(replay_batch_size=3)).ratio
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
        (by_chance, False, "other numbers each time"),
    ],
)
def test_what_makes_the_ratio_differ_from_1(make, by, bf16, cause):
    trainer = make(bf16=bf16, shared_noise=bf16, replay_batch_size=3, max_steps=2)
    disturb(trainer, by)
    report = preflight(trainer)
    assert cause in report.ratio.cause and cause in str(report)
    if by is by_chance:
        return
    assert "batch shape (sampled 8 at once, replayed " in report.ratio.cause
    assert report.ratio.same_batch == 0
    assert (report.ratio.float32 == 0) == (by is under_autocast)
    trainer.train()
    shown = logged(trainer, "ratio/on_policy_max_deviation")[0]
    assert report.ratio.max_deviation == pytest.approx(shown, rel=1e-5) and shown > 1e-5


def test_batches_of_one_size_mend_the_ratio(make):
    trainer = make(replay_batch_size=3, epsilon=1e-4)
    disturb(trainer, by_size)
    report = preflight(trainer)
    assert report.ratio.share > 0.1
    assert any("sample_batch_size=3, replay_batch_size=3" in warning for warning in report.warnings)
    trainer = make(replay_batch_size=4, sample_batch_size=4, epsilon=1e-4)
    assert preflight(trainer).ratio.max_deviation == 0


# ---- Warnings ----


def test_warnings(make):
    report = preflight(make())
    assert report.warnings == [] and "Warnings\n  none" in str(report)
    (warning,) = preflight(make(epsilon=1e-4)).warnings
    assert "epsilon=0.0001 is 0.1 nats over the 1024 elements" in warning
    assert "nearly every update will be clipped. Use epsilon=1.3e-02" in warning
    (warning,) = preflight(make(max_steps=4)).warnings  # two iterations of a sweep of three
    assert "takes 3 iterations" in warning and "window_interval=1" in warning


def test_no_prompts(make):
    with pytest.raises(ValueError, match="train_dataset"):
        preflight(make(train_dataset=None))


# ---- Nothing is left behind ----


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lora": False, "gradient_checkpointing": True, "beta": 0.1},
        {"bf16": True, "gradient_accumulation_steps": 2, "ode_solver": "dpmsolver++"},
        {"reuse_rollout_graph": True, "steps_per_generation": 1, "per_device_train_batch_size": 8, "max_steps": 3},
    ],
)
def test_a_run_is_the_same_without(make, tiny_pipe, kwargs):
    before = {name: value.clone() for name, value in tiny_pipe.transformer.state_dict().items()}
    runs = []
    for check in (False, True):
        if hasattr(tiny_pipe.transformer, "peft_config"):
            tiny_pipe.transformer.delete_adapters("default")
        tiny_pipe.transformer.load_state_dict(before, strict=False)
        trainer = make(**kwargs)
        if check:
            preflight(trainer)
        trainer.train()
        entries = [
            {name: value for name, value in entry.items() if not name.startswith(("time/", "train_"))}
            for entry in trainer.state.log_history
        ]
        runs.append(([p.detach().clone() for p in trained(trainer)], entries))
    (weights, log), (weights_after_check, log_after_check) = runs
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after_check, strict=True))
    assert log == log_after_check


def test_the_trainer_is_left_as_it_was(make):
    trainer = make(gradient_checkpointing=True)
    disturb(trainer, by_chance)  # draws from the global random state
    transformer = trainer.pipe.transformer
    weights = [p.clone() for p in transformer.parameters()]
    gradient = trained(trainer)[0].grad = torch.ones_like(trained(trainer)[0])
    config, state = dict(trainer.noise_scheduler.config), torch.get_rng_state()
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()
    preflight(trainer)
    assert trained(trainer)[0].grad is gradient and bool((gradient == 1).all())
    assert all(p.grad is None for p in transformer.parameters() if p.grad is not gradient)
    assert all(torch.equal(p, old) for p, old in zip(transformer.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all() and random.getstate() == python_state
    assert not transformer.is_gradient_checkpointing
    assert trainer.optimizer is None and trainer._rollout is None and trainer.prompt_sampler is None
    assert dict(trainer.noise_scheduler.config) == config and trainer.noise_scheduler.num_inference_steps is None
    assert trainer.state.log_history == [] and trainer._metrics == {} and trainer._seconds == {}


def test_an_error_leaves_nothing_behind_either(make, monkeypatch):
    trainer = make(gradient_checkpointing=True)
    monkeypatch.setattr(trainer.policy, "decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preflight(trainer)
    assert not trainer.pipe.transformer.is_gradient_checkpointing
    assert all(p.grad is None for p in trainer.pipe.transformer.parameters())


def test_a_check_in_between(make):
    """After some training it is about the weights as they are, and says the same of the batches."""
    trainer = make(bf16=True)
    before = preflight(trainer)
    trainer.train()
    after = preflight(trainer)
    assert after.batch == before.batch and after.nfe == before.nfe and after.memory == before.memory
    assert after.ratio.max_deviation < 1e-3
