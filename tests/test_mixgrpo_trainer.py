"""The trainer, end to end, on a miniature FLUX with random weights."""

import json
import math
import os

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from helpers import PROMPTS, assert_same, build_pipeline, logged, make_trainer, redness, trained
from peft import LoraConfig
from transformers import TrainerCallback

from diffusers_mixgrpo import RewardError


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
def make(tmp_path):
    """A trainer of a new pipeline: two prompts with four images each per iteration, two optimizer steps in each."""
    return lambda *args, **changes: make_trainer(tmp_path / "output", *args, **changes)


def pixels(images):
    return np.stack([np.asarray(image, dtype=int) for image in images])


# ---- Learning ----


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns(make, lora):
    """More red with a LoRA; in full fine-tuning less of it, by the second of two rewards."""

    def greenness(prompts, images, **columns):
        return [-score for score in redness(prompts, images)]

    trainer = make(
        rewards=redness if lora else [redness, greenness],
        reward_weights=None if lora else [0.0, 1.0],
        lora=lora,
        eval_dataset=PROMPTS,
        learning_rate=2e-2 if lora else 2e-3,
        max_steps=24,
        num_generations=8,
        per_device_train_batch_size=8,
        steps_per_generation=4,
        num_inference_steps=4,
    )
    transformer = trainer.pipe.transformer
    frozen = {n: p.clone() for part in (trainer.pipe.vae, transformer) for n, p in part.named_parameters()}
    learned = trained(trainer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward"] > before["eval_reward"] + 5 * before["eval_reward_se"]
    assert np.mean(logged(trainer, "reward")[-2:]) > np.mean(logged(trainer, "reward")[:2])
    if not lora:
        assert after["eval_rewards/redness/mean"] == pytest.approx(-after["eval_rewards/greenness/mean"])
        assert after["eval_reward"] == pytest.approx(after["eval_rewards/greenness/mean"])
    now = {n: p for part in (trainer.pipe.vae, transformer) for n, p in part.named_parameters()}
    kept = frozen.keys() - learned.keys()
    assert any("transformer_blocks" in name for name in kept) == lora
    assert_same({name: now[name] for name in kept}, {name: frozen[name] for name in kept})


# ---- Batch arithmetic ----


def test_the_papers_setting(make):
    """12 images of one prompt, 3 per optimizer step, 4 optimizer steps an iteration."""
    reward = Recorder()
    steps = []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            steps.append(len(reward.calls))

    trainer = make(
        rewards=reward,
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
    make(rewards=reward, max_steps=2).train()
    prompts, images, columns = reward.calls[-1]
    assert len(prompts) == len(images) == len(columns["tag"]) == 8
    assert [PROMPTS[tag]["prompt"] for tag in columns["tag"]] == prompts
    assert prompts[0] == prompts[3] != prompts[4] == prompts[7]
    assert columns.keys() == {"tag"}


def test_several_passes_over_the_same_images(make):
    reward = Recorder()
    trainer = make(rewards=reward, num_iterations=2, max_steps=8, learning_rate=5e-2)
    trainer.train()
    assert len(reward.calls) == 1 + 2  # one trial, two iterations of four optimizer steps
    deviation = logged(trainer, "ratio/max_deviation")
    # Only rounding before the first update of an iteration, and the updates' effect after it
    assert deviation[0] < 1e-4 < deviation[1] and deviation[4] < 1e-4 < deviation[5]
    assert logged(trainer, "ratio/on_policy_max_deviation") == [deviation[0], deviation[4]]


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "weight_decay": 0.0}
WHOLE = {"max_steps": 1, "per_device_train_batch_size": 8, "steps_per_generation": 1}


def one_iteration(make, **changes):
    """The gradient of an iteration with a single optimizer step, as the change of the weights under plain SGD."""
    trainer = make(**(SGD | WHOLE | changes))
    before = trained(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    return {name: before[name] - value for name, value in trained(trainer).items()}, trainer


def assert_close(first, second):
    """
    The same gradients up to 1e-4 of the largest element of all.

    float32 has 6e-8 of a number, and sums over 64 tokens and 16 transitions are taken in another order. Here they are
    differences of weights, most of which are smaller than 1.
    """
    scale = max(value.abs().max().item() for value in second.values())
    assert scale > 1e-5
    assert_same(first, second, atol=1e-4 * scale + 1e-7)


def test_accumulation_gives_the_gradient_of_the_whole(make):
    expected, whole = one_iteration(make)
    parts = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    gradient, trainer = one_iteration(make, **parts, replay_batch_size=3)
    assert_close(gradient, expected)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(whole, "loss")[0], abs=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(make):
    expected, _ = one_iteration(make)
    gradient, trainer = one_iteration(make, gradient_checkpointing=True)
    assert trainer.pipe.transformer.is_gradient_checkpointing
    assert_close(gradient, expected)
    with pytest.raises(ValueError, match="every_n_layers=2"):
        kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
        one_iteration(make, **kwargs)


def test_dropout_is_off(make):
    gradient, trainer = one_iteration(make, lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5))
    assert max(logged(trainer, "ratio/max_deviation")) < 1e-4
    expected, _ = one_iteration(make)
    assert_close(gradient, expected)


def test_with_nothing_to_learn_nothing_changes(make):
    trainer = make(rewards=lambda prompts, images, **columns: [0.1] * len(images), **(SGD | WHOLE))
    before = trained(trainer)
    trainer.train()
    assert_same(trained(trainer), before)
    assert logged(trainer, "frac_reward_zero_std") == [1.0]


def test_clipping(make):
    """With a clip range that nothing fits in, what has moved too far gets no gradient, but the first step has one."""
    batches = WHOLE | {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2}
    trainer = make(epsilon=1e-5, **batches)
    trainer.train()
    high, low = logged(trainer, "clip_ratio/high_mean"), logged(trainer, "clip_ratio/low_mean")
    assert logged(trainer, "clip_ratio/region_mean")[-1] == pytest.approx(high[-1] + low[-1])
    assert high[0] == low[0] == 0
    assert high[-1] + low[-1] > 0.5  # most moved the right way, and beyond the range
    # A range of one side only
    trainer = make(epsilon=1.0, epsilon_high=1e-5, **batches)
    trainer.train()
    assert logged(trainer, "clip_ratio/low_mean") == [0.0, 0.0]
    assert logged(trainer, "clip_ratio/high_mean")[-1] > 0


# ---- Precision ----


@pytest.mark.parametrize("lora", [True, False])
def test_bfloat16(make, pipeline_folder, lora):
    trainer = make(pipe=pipeline_folder, lora=lora, bf16=True, eval_dataset=PROMPTS[:2], max_steps=2)
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
    # Roundings of 4e-3 of each of 1024 velocities, whose signs are random
    assert max(logged(trainer, "ratio/on_policy_max_deviation")) < 1e-3


def test_precision_of_a_loaded_pipeline(make, pipeline_folder):
    trainer = make(pipe=pipeline_folder, model_init_kwargs={"torch_dtype": "float64"})
    assert trainer.pipe.vae.dtype == torch.float64
    trainer = make(pipe=pipeline_folder)
    assert {p.dtype for p in trainer.pipe.transformer.parameters()} == {torch.float32}


# ---- Evaluation ----


def test_evaluation(make):
    recorder = Recorder(lambda prompts, images, **columns: [None] + [1.0] * (len(images) - 1))
    trainer = make(
        rewards=[redness, recorder],
        eval_dataset=PROMPTS,
        eval_seed=7,
        per_device_eval_batch_size=5,
        reward_weights=[1, 0],
    )
    metrics = trainer.evaluate()
    assert trainer.state.log_history[-1].items() >= metrics.items()
    assert metrics["eval_rewards/recorder/failed"] == metrics["eval_rewards/recorder/mean"] == 1
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_rewards/redness/mean"])
    assert metrics["eval_reward_se"] == pytest.approx(metrics["eval_rewards/redness/std"] / math.sqrt(5), rel=1e-6)
    # Prompt i has the seed eval_seed + i, in `sample_images` too.
    images = trainer.sample_images([row["prompt"] for row in PROMPTS])
    assert np.array_equal(pixels(recorder.calls[-1][1]), pixels(images))
    same = trainer.sample_images([row["prompt"] for row in PROMPTS], seeds=range(7, 12))
    assert np.array_equal(pixels(images), pixels(same))


def test_evaluation_at_another_size(make):
    sizes = set()

    def seen(prompts, images, **columns):
        sizes.update(image.size for image in images)
        return redness(prompts, images)

    trainer = make(rewards=seen, eval_dataset=PROMPTS, eval_height=64, eval_width=48, max_steps=2)
    trainer.evaluate()
    assert sizes == {(48, 64)}
    assert {image.size for image in trainer.sample_images(["a cat"])} == {(48, 64)}
    sizes.clear()
    trainer.train()
    assert sizes == {(32, 32)}
    with pytest.raises(ValueError, match="`eval_width` must be a positive multiple of 4 pixels, got 50. Use 48 or 52"):
        make(eval_width=50)


def test_evaluation_during_training(make):
    trainer = make(eval_dataset={"one": PROMPTS[:2], "two": PROMPTS[2:]}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    # Every optimizer step asks for one; it waits for the end of the iteration, which has two.
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_one_reward" in entry]
    assert steps == [2, 4]
    assert len(logged(trainer, "eval_two_rewards/redness/mean")) == 2


# ---- Logging ----


def test_metrics(make):
    trainer = make(max_steps=6, ode_solver="dpmsolver++", suffix_ratio=0.5, beta=0.1)
    trainer.train()
    assert logged(trainer, "window/start") == [0, 1, 2]
    assert logged(trainer, "nfe") == [2 + 2, 1 + 2 + 1, 2 + 2 + 1]
    assert logged(trainer, "nfe_amortized") == [4, 1 / 4 + 2 + 1, 2 / 4 + 2 + 1]
    names = ["reward", "reward_std", "frac_reward_zero_std", "rewards/redness/mean", "rewards/redness/std"]
    names += ["rewards/redness/failed", "time/sampling", "time/decoding", "time/reward", "time/training"]
    for name in names:
        assert len(logged(trainer, name)) == 3, name
    names = ["loss", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "ratio/mean", "kl"]
    for name in [*names, "ratio/max_deviation"]:
        assert len(logged(trainer, name)) == 6, name
    assert logged(trainer, "kl")[0] < 1e-10  # the LoRA begins at the reference
    # By place of the window, the gradient before clipping
    for place in ("00", "01", "02"):
        assert len(logged(trainer, f"reward_std_by_window/{place}")) == 1
        assert len(logged(trainer, f"clip_ratio_by_window/{place}")) == 2
    norms = [norm for place in ("00", "01", "02") for norm in logged(trainer, f"grad_norm_by_window/{place}")]
    assert norms == pytest.approx(logged(trainer, "grad_norm"), rel=1e-5)
    json.dumps(trainer.state.log_history)


def test_one_progress_bar_with_the_reward(make, capfd):
    make(max_steps=4, logging_steps=1, disable_tqdm=False).train()
    shown = capfd.readouterr()
    assert "{'loss'" not in shown.out + shown.err
    last = shown.err.replace("\r", "\n").strip().splitlines()[-1]
    assert "4/4" in last and "reward=" in last and "window=" in last


# ---- Saving ----


def sample(pipe):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    arguments = {"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 4}
    pipe.set_progress_bar_config(disable=True)
    return pixels(pipe(["a cat", "red", "x"], generator=generators, **arguments).images)


def random_lora() -> LoraConfig:
    """One that changes images from the start."""
    return LoraConfig(r=4, lora_alpha=64, init_lora_weights=False)


def test_a_lora_comes_back_in_the_stock_pipeline(make, tmp_path, pipeline_folder):
    trainer = make(lora=random_lora(), max_steps=2)
    trainer.train()
    trainer.save_model()
    expected = sample(trainer.pipe)
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    untrained = sample(stock)
    stock.load_lora_weights(str(tmp_path / "output"))
    assert np.abs(expected - untrained).max() > 20
    # The trainer's VAE has another memory format, whose convolutions round otherwise: at most by a step of 255.
    assert np.abs(sample(stock) - expected).max() <= 1


def test_a_full_fine_tuning_comes_back_in_the_stock_pipeline(make, tmp_path, pipeline_folder):
    trainer = make(lora=False, learning_rate=2e-2, max_steps=2)
    trainer.train()
    trainer.save_model()
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "output", subfolder="transformer")
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    untrained = sample(stock)
    stock.transformer = transformer
    assert np.abs(sample(stock) - untrained).max() > 20
    assert np.abs(sample(stock) - sample(trainer.pipe)).max() <= 1


def test_training_goes_on_with_a_loaded_lora(make, tmp_path, pipeline_folder):
    trainer = make(lora=random_lora(), max_steps=2)
    trainer.train()
    trainer.save_model()
    pipe = FluxPipeline.from_pretrained(pipeline_folder)
    pipe.load_lora_weights(str(tmp_path / "output"), adapter_name="mine")
    again = make_trainer(tmp_path / "again", pipe=pipe, lora=False, max_steps=2)
    before = trained(again)
    assert before and all(".mine." in name for name in before)
    assert_same({name.replace(".mine.", ".default."): value for name, value in before.items()}, trained(trainer))
    again.train()
    again.save_model()
    assert any(not torch.equal(value, before[name]) for name, value in trained(again).items())
    stock = FluxPipeline.from_pretrained(pipeline_folder)
    stock.load_lora_weights(str(tmp_path / "again"))
    assert np.abs(sample(stock) - sample(again.pipe)).max() <= 1


@pytest.mark.parametrize("lora, steps", [(True, (2, 4, 6)), (False, (4,))])
def test_resuming_is_exact(make, tmp_path, lora, steps):
    """Through ends of epochs (five prompts, two per iteration), with a moving window and a learning rate schedule."""
    kwargs = {"lora": lora, "max_steps": 8, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
    reward = Recorder()
    whole = make(rewards=reward, **kwargs)
    whole.train()
    for step in steps:  # inside an epoch, at its end, inside the next
        again = Recorder()
        resumed = make(rewards=again, **kwargs)
        for parameter in resumed.pipe.transformer.parameters():
            parameter.data += parameter.requires_grad * 0.1  # what is trained must come from the checkpoint
        resumed.train(resume_from_checkpoint=str(tmp_path / "output" / f"checkpoint-{step}"))
        assert_same(trained(resumed), trained(whole))
        assert [call[0] for call in again.calls[1:]] == [call[0] for call in reward.calls[1 + step // 2 :]]
        for mine, others in zip(again.calls[1:], reward.calls[1 + step // 2 :], strict=True):
            assert np.array_equal(pixels(mine[1]), pixels(others[1]))
        assert logged(resumed, "window/start") == logged(whole, "window/start")
        assert logged(resumed, "reward") == logged(whole, "reward")


def test_resuming_a_second_time_with_more_steps(make):
    kwargs = {"save_strategy": "steps", "save_steps": 2}
    make(max_steps=2, **kwargs).train()
    resumed = make(max_steps=4, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    straight = make(max_steps=4)
    straight.train()
    assert_same(trained(resumed), trained(straight))


def test_checkpoints_wait_for_the_end_of_an_iteration(make, tmp_path):
    batches = {"per_device_train_batch_size": 1, "steps_per_generation": 4}
    make(max_steps=8, **batches, save_strategy="steps", save_steps=3, save_total_limit=5).train()
    folders = sorted(name for name in os.listdir(tmp_path / "output") if name.startswith("checkpoint"))
    assert folders == ["checkpoint-4", "checkpoint-8"]


def test_checkpoints_that_cannot_be_resumed(make, tmp_path):
    make(max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="must be a checkpoint of full fine-tuning .*which has no transformer"):
        make(lora=False).train(resume_from_checkpoint=checkpoint)
    for other in (LoraConfig(r=8), LoraConfig(r=4, target_modules=["to_q"])):
        with pytest.raises(ValueError, match="has other layers or another rank than this trainer's"):
            make(lora=other).train(resume_from_checkpoint=checkpoint)


def test_the_best_model_is_loaded_at_the_end(make):
    rewards = iter([0.5, 0.9, 0.2])

    def judge(prompts, images, **columns):
        return [next(rewards)] * 5 if len(images) == 5 else redness(prompts, images)

    trainer = make(
        rewards=judge,
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


# ---- Errors and interruptions ----


def test_a_reward_that_cannot_work_is_found_before_training(make, monkeypatch):
    def missing(prompts, images, **columns):
        return [0.0] * (len(images) - 1)

    trainer = make(rewards=[redness, missing])
    monkeypatch.setattr(trainer.engine, "encode", None)  # nothing may be sampled
    with pytest.raises(RewardError, match="`missing` must return one score per image, got 1 scores for 2"):
        trainer.train()


def test_an_error_during_training_loses_nothing(make, tmp_path):
    calls = []

    def fails_later(prompts, images, **columns):
        calls.append(len(images))
        return redness(prompts, images)[: None if len(calls) < 3 else -1]

    # An older run's checkpoint of that name is no reason not to save this one's.
    make(max_steps=2, seed=1, save_strategy="steps", save_steps=2).train()
    trainer = make(rewards=fails_later)
    with pytest.raises(RewardError, match="`fails_later` must .*, got 7 scores for 8 images") as caught:
        trainer.train()
    checkpoint = str(tmp_path / "output" / "checkpoint-2")
    assert checkpoint in caught.value.__notes__[0] and "2 optimizer steps" in caught.value.__notes__[0]
    assert os.path.exists(os.path.join(checkpoint, "pytorch_lora_weights.safetensors"))
    fixed = make()
    fixed.train(resume_from_checkpoint=checkpoint)
    straight = make()
    straight.train()
    assert_same(trained(fixed), trained(straight))


def test_an_interruption_loses_nothing_either(make, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = make(callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # Inside an iteration: its images are sampled again.
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-3"))
    assert again.state.global_step == 4
    trainer.remove_callback(Interrupt)
    trainer.train()  # and the interrupted trainer is still good
    assert trainer.state.global_step == 4


# ---- Several runs ----


@pytest.mark.parametrize("at", [2, 3])
def test_interrupted_and_trained_again(tmp_path, at, caplog):
    """Before its first update the trainer is as new; afterwards it says what it goes on with."""
    calls = []

    def interrupt(prompts, images, **columns):
        calls.append(len(images))
        if len(calls) == at:
            raise KeyboardInterrupt
        return redness(prompts, images)

    trainer = make_trainer(tmp_path / "a", rewards=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    caplog.clear()
    trainer.train()
    assert trainer.state.global_step == 4
    straight = make_trainer(tmp_path / "b")
    straight.train()
    warned = "has trained for 2 steps already" in caplog.text
    assert warned == (at == 3)
    if at == 2:
        assert_same(trained(trainer), trained(straight))


def test_two_trainers_on_two_pipelines(tmp_path):
    """Made at once and run one after the other, they do what each does alone."""
    changes = {
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "seed": 3,
    }
    alone = make_trainer(tmp_path / "a")
    alone.train()
    alone_too = make_trainer(tmp_path / "b", **changes)
    alone_too.train()
    first = make_trainer(tmp_path / "c")
    second = make_trainer(tmp_path / "d", **changes)
    first.train()
    second.train()
    assert_same(trained(first), trained(alone))
    assert_same(trained(second), trained(alone_too))


def test_two_trainers_on_one_pipeline(make, tiny_pipe):
    first = make(pipe=tiny_pipe, lora=False)
    second = make(pipe=tiny_pipe)
    with pytest.raises(ValueError, match=r"must have the active LoRAs \[\] .* got \['default'\]"):
        first.train()
    second.train()
    assert second.state.global_step == 4


# ---- Rewards ----


def test_reward_models_are_moved(make):
    class Model:
        places = []

        def to(self, device):
            self.places.append(str(device))

        def __call__(self, prompts, images, **columns):
            return redness(prompts, images)

    make(rewards=Model(), max_steps=2).train()
    assert Model.places == ["cpu"]
    Model.places.clear()
    make(rewards=Model(), max_steps=2, offload_rewards=True).train()
    assert Model.places == ["cpu", "cpu"] * 2  # to the device and back: the trial, and one iteration


def test_rewards_by_name(make, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def greenness(prompts, images, **columns):\n    return [0.5] * len(images)\n")
    (tmp_path / "theirs.py").write_text(
        "class Constant:\n"
        "    def __init__(self, value=0.0):\n        self.value = value\n"
        "    def __call__(self, prompts, images, **columns):\n        return [self.value] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    trainer = make(rewards=["jpeg_compressibility", "mine:greenness"], max_steps=2)
    assert trainer.reward_names == ["jpeg_compressibility", "greenness"]
    trainer.train()
    assert logged(trainer, "rewards/jpeg_compressibility/mean")[0] < 0
    trainer = make(rewards="theirs:Constant", reward_init_kwargs={"theirs:Constant": {"value": 3.0}})
    assert trainer.reward_funcs[0].value == 3.0
    with pytest.raises(ValueError, match="`reward_init_kwargs` must be empty for 'mine:greenness', which is a func"):
        make(rewards="mine:greenness", reward_init_kwargs={"mine:greenness": {"value": 3.0}})
    with pytest.raises(ValueError, match="`reward_init_kwargs` must be for rewards among .*, got hpsv2"):
        make(rewards="mine:greenness", reward_init_kwargs={"hpsv2": {}})
    with pytest.raises(ValueError, match="`reward_funcs` must be one of hpsv2, pickscore.*, got 'hps'"):
        make(rewards="hps")


# ---- The constructor ----


def test_errors_of_the_constructor(make):
    pipe = build_pipeline()
    for changes, error, message in (
        ({"train_dataset": []}, ValueError, "`train_dataset` must have at least one row"),
        (
            {"eval_dataset": {"a": PROMPTS, "b": [{"text": "a"}]}},
            ValueError,
            r"`eval_dataset\['b'\]` must have a column 'prompt' of strings, got the columns \['text'\]",
        ),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "got 2 weights for 1 reward function"),
        ({"rewards": [3]}, TypeError, "`reward_funcs` must be"),
        ({"height": 34}, ValueError, "`height` must be a positive multiple of 4 .*got 34. Use 32 or 36"),
        ({"pipe": "no/such/pipeline"}, FileNotFoundError, "got 'no/such/pipeline': there is no such folder"),
        ({"pipe": pipe.transformer}, TypeError, "supported diffusers pipelines.*got FluxTransformer2DModel"),
        ({"lora": False, "merge_lora": True}, ValueError, "`merge_lora` must be False without a LoRA, got True"),
    ):
        with pytest.raises(error, match=message):
            make(**({"pipe": pipe} | changes))
    with pytest.raises(ValueError, match="`train_dataset` must have rows with a 'prompt', got None"):
        make(train_dataset=None).train()
    with pytest.raises(ValueError, match="`eval_dataset` must have rows with a 'prompt', got None"):
        make().evaluate()
    make(pipe=pipe)
    with pytest.raises(ValueError, match=r"`peft_config` must be None for a pipeline that has a LoRA.*\['default'\]"):
        make(pipe=pipe)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ValueError, match="may not predict a velocity"):
        make(pipe=pipe, lora=False)


def test_the_seed_draws_the_lora(make):
    weights = []
    for seed, noise in ((1, 2), (1, 3), (2, 3)):
        pipe = build_pipeline()
        torch.manual_seed(noise)
        weights.append(trained(make(pipe=pipe, seed=seed)))
    assert_same(weights[0], weights[1])
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_the_users_lora_config_is_left_alone(make):
    peft_config = LoraConfig(r=2)
    trainer = make(lora=peft_config)
    assert "attn.to_add_out" in trainer.pipe.transformer.peft_config["default"].target_modules
    assert peft_config.target_modules is None
