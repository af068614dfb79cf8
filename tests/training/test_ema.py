"""The moving average of the trained weights: its values, its evaluation, its files, and exact resuming."""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from helpers import PROMPTS, assert_same, build_pipeline, logged, make_trainer, redness, trained
from transformers import TrainerCallback

from diffusers_mixgrpo.training import ema as ema_module
from diffusers_mixgrpo.training.ema import EMAWeights


DECAY = 0.28  # reached in the fourth step
INSIDE = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "max_steps": 8}


@pytest.fixture
def make(tmp_path):
    """Trainers of pipelines of their own, which are alike, with one output folder."""
    return lambda **kwargs: make_trainer(tmp_path / "output", **{"ema_decay": DECAY, **kwargs})


def averaged(trainer) -> dict[str, torch.Tensor]:
    """Copies of the moving average."""
    with trainer.ema.applied():
        return trained(trainer)


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, second[name]) for name, value in first.items())


class Record(TrainerCallback):
    """Notes the trained weights of its `trainer` after each step."""

    def __init__(self):
        self.trainer = None
        self.weights = []

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(trained(self.trainer))


class StopBefore(TrainerCallback):
    """A Ctrl-C when `step` optimizer steps are done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ---- Values ----


def average_of(weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """In float64: each step's weights times their share in the average after the last."""
    decays = [0.0, *(min(DECAY, t / (9 + t)) for t in range(2, len(weights) + 1))]
    shares = [(1 - d) * np.prod(decays[t + 1 :]) for t, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    return {name: sum(s * w[name].double() for s, w in zip(shares, weights, strict=True)) for name in weights[0]}


def assert_average(trainer, record: Record) -> None:
    """
    Within the rounding of float32, with the unit `u = 2^-24 max |w|`.

    The difference of two weights, the factor `1 - d`, and their product each add up to `2 u`, the sum adds `u`: 7 in a
    step. Later steps shrink an error by `d` each, so that all add up to less than twice that of one step.
    """
    expected = average_of(record.weights)
    actual = averaged(trainer)
    assert actual.keys() == expected.keys() == trained(trainer).keys()
    for name, value in expected.items():
        largest = max(weights[name].abs().max() for weights in record.weights)
        assert (actual[name].double() - value).abs().max() <= 2 * 7 * 2**-24 * largest, name


@pytest.mark.parametrize("lora", [True, False])
def test_the_average_of_a_run(make, lora):
    record = Record()
    trainer = make(lora=lora, callbacks=[record], max_steps=6)
    record.trainer = trainer
    trainer.train()
    assert_average(trainer, record)
    assert differ(averaged(trainer), trained(trainer))


def test_it_changes_nothing_else(make, tmp_path):
    trainer = make()
    trainer.train()
    without = make(ema_decay=None)
    assert without.ema is None
    without.train()
    assert_same(trained(without), trained(trainer))
    assert logged(without, "reward") == logged(trainer, "reward")
    trainer.save_model(str(tmp_path / "with"))
    without.save_model(str(tmp_path / "without"))
    assert (tmp_path / "with" / "ema").is_dir() and not (tmp_path / "without" / "ema").exists()


def test_a_dropped_step_counts_with_the_same_weights(make):
    record = Record()
    trainer = make(callbacks=[record])
    record.trainer = trainer
    backward = trainer.engine.backward

    def sometimes_infinite(*args, **kwargs):
        batch = backward(*args, **kwargs)
        if len(record.weights) == 2:
            trainer.engine.trained_parameters[0].grad.fill_(torch.inf)
        return batch

    trainer.engine.backward = sometimes_infinite
    trainer.train()
    assert_same(record.weights[2], record.weights[1])
    assert_average(trainer, record)


def test_weights_that_an_average_would_be_lost_in():
    for dtype in (torch.bfloat16, torch.float16):
        weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=dtype))]
        with pytest.raises(ValueError, match=f"`ema_decay` must be None for trained weights in {dtype}, got 0.5"):
            EMAWeights(weights, 0.5)
    EMAWeights([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))], 0.5)


# ---- In the model and out ----


def small_average() -> tuple[EMAWeights, list[torch.nn.Parameter]]:
    weights = [torch.nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    average = EMAWeights(weights, 0.5)
    with torch.no_grad():
        for weight in weights:
            weight += 10
    return average, weights


def values(weights: list[torch.nn.Parameter]) -> list[float]:
    return [weight[0].item() for weight in weights]


def test_the_average_is_in_the_model_in_its_context_only():
    average, weights = small_average()
    with average.applied():
        assert values(weights) == [0, 1, 2]
        with pytest.raises(RuntimeError, match="has the moving average already"), average.applied():
            pass
        assert values(weights) == [0, 1, 2]
    assert values(weights) == [10, 11, 12]
    with pytest.raises(ZeroDivisionError), average.applied():
        1 / 0  # noqa: B018
    assert values(weights) == [10, 11, 12]


def test_a_signal_at_any_line_loses_no_weights():
    """A signal's exception may come in the middle of an exchange, also on the way back."""
    for at in itertools.count():
        average, weights = small_average()
        lines = itertools.count()

        def trace(frame, event, argument, lines=lines, at=at):
            if frame.f_code.co_filename != ema_module.__file__:
                return None
            if event == "line" and next(lines) == at:
                raise KeyboardInterrupt
            return trace  # noqa: B023

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with average.applied():
                pass
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        average.restore()
        assert values(weights) == [10, 11, 12], at
        with average.applied():
            assert values(weights) == [0, 1, 2], at
        if not interrupted:
            break
    assert at > 15


# ---- Evaluation and files ----


def load_average(folder: Path, lora: bool) -> FluxPipeline:
    """The stock pipeline with the average from a run's folder, as the documentation says."""
    pipe = build_pipeline()
    if lora:
        pipe.load_lora_weights(str(folder), weight_name="ema/pytorch_lora_weights.safetensors")
    else:
        pipe.transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="ema/transformer")
    return pipe


@pytest.mark.parametrize("lora, learning_rate", [(True, 0.3), (False, 0.03)])
def test_the_average_is_evaluated_and_saved(make, tmp_path, lora, learning_rate):
    """The steps are so large that the images change."""
    trainer = make(lora=lora, learning_rate=learning_rate, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert len(logged(trainer, "eval_ema_reward")) == len(logged(trainer, "eval_reward")) == 2
    metrics = trainer.evaluate()
    names = {name for name in metrics if name.startswith("eval_")}
    names.remove("eval_alarms")  # the guard looks at the trained weights
    assert {name for name in names if name.startswith("eval_ema_")} == {
        name.replace("eval_", "eval_ema_") for name in names if not name.startswith("eval_ema_")
    }
    assert {"eval_ema_reward", "eval_ema_reward_se", "eval_ema_rewards/redness/mean"} <= metrics.keys()
    # After the last step
    assert metrics["eval_reward"] == logged(trainer, "eval_reward")[1]
    assert metrics["eval_ema_reward"] == logged(trainer, "eval_ema_reward")[1]
    assert abs(metrics["eval_ema_reward"] - metrics["eval_reward"]) > 1e-3
    assert trainer.eval_rewards.mean() == pytest.approx(metrics["eval_reward"])
    named = trainer.evaluate({"held_out": PROMPTS[:2]})
    assert {"eval_held_out_reward", "eval_held_out_ema_reward"} <= named.keys()

    trainer.save_model()
    pipe = load_average(tmp_path / "output", lora)
    again = make(pipe=pipe, lora=False, ema_decay=None, eval_dataset=PROMPTS).evaluate()
    assert again["eval_reward"] == metrics["eval_ema_reward"]
    with trainer.ema.applied():
        (expected,) = trainer.sample_images(["a cat"], [7])
    (unaveraged,) = trainer.sample_images(["a cat"], [7])
    image = load_average(tmp_path / "output", lora)(
        "a cat",
        **{"height": 32, "width": 32, "max_sequence_length": 12, "num_inference_steps": 5},
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    # The trainer's VAE has another memory format, whose convolutions round otherwise: at most by a step of 255.
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(unaveraged, dtype=int)).max() > 2


def test_the_best_average(make, tmp_path):
    """Its checkpoint's weights and average are those of the model at the end."""
    scores = iter([1.0, 5.0, 3.0, 9.0, 4.0, 1.0])  # of the trained weights and the average, at steps 2, 4 and 6

    def judge(prompts, images, tag):
        return [next(scores)] if tag == ["held out"] else redness(prompts, images)

    trainer = make(
        rewards=judge,
        eval_dataset=[{"prompt": "a cat", "tag": "held out"}],
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="ema_reward",
    )
    trainer.train()
    assert logged(trainer, "eval_reward") == [1, 3, 4] and logged(trainer, "eval_ema_reward") == [5, 9, 1]
    assert trainer.state.best_metric == 9 and trainer.state.best_global_step == 4
    other = make()
    other._load_from_checkpoint(str(tmp_path / "output" / "checkpoint-4"))
    assert_same(trained(trainer), trained(other))
    assert_same(averaged(trainer), averaged(other))
    assert differ(averaged(other), trained(other))


# ---- Resuming ----


@pytest.mark.parametrize("lora", [True, False])
def test_resuming_is_exact(make, tmp_path, lora):
    straight = make(lora=lora, **INSIDE)
    straight.train()
    for step in (4, 5):  # at the end of an iteration and inside one
        with pytest.raises(KeyboardInterrupt) as caught:
            make(lora=lora, callbacks=[StopBefore(step)], **INSIDE).train()
        assert f"checkpoint-{step}" in caught.value.__notes__[0]
        resumed = make(lora=lora, **INSIDE)
        resumed.train(resume_from_checkpoint=True)
        assert_same(trained(resumed), trained(straight))
        assert_same(averaged(resumed), averaged(straight))
        assert differ(averaged(resumed), trained(resumed))
        shutil.rmtree(tmp_path / "output")


def test_a_checkpoint_holds_the_average_of_its_step(make, tmp_path):
    record = Record()
    trainer = make(callbacks=[record], save_strategy="steps", save_steps=2)
    record.trainer = trainer
    trainer.train()
    for step in (2, 4):
        other = make()
        other._load_from_checkpoint(str(tmp_path / "output" / f"checkpoint-{step}"))
        assert_same(trained(other), record.weights[step - 1])
    assert_same(averaged(other), averaged(trainer))


def test_an_error_while_the_average_is_in_the_model(make):
    """The save after it has the trained weights, and a resumed run ends as one without the error."""
    arguments = {"eval_dataset": PROMPTS[:1], "eval_strategy": "steps", "eval_steps": 2}
    straight = make(**arguments)
    straight.train()
    failing = make(**arguments)
    evaluate = failing.evaluator.evaluate
    calls = itertools.count()

    def fails(*args):
        if next(calls) == 1:
            assert differ(trained(failing), raw)
            raise KeyboardInterrupt
        raw.update(trained(failing))
        return evaluate(*args)

    raw: dict[str, torch.Tensor] = {}
    failing.evaluator.evaluate = fails
    with pytest.raises(KeyboardInterrupt) as caught:
        failing.train()
    assert "checkpoint-2" in caught.value.__notes__[0]
    assert_same(trained(failing), raw)
    resumed = make(**arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same(trained(resumed), trained(straight))
    assert_same(averaged(resumed), averaged(straight))


def test_a_checkpoint_without_an_average(make, caplog):
    first = make(ema_decay=None, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    finished = make(max_steps=2)
    finished.train(resume_from_checkpoint=True)
    assert "checkpoint-2 has no moving average" in caplog.text
    assert_same(averaged(finished), trained(first))
    caplog.clear()
    make(max_steps=2, save_strategy="steps", save_steps=2).train()
    make(ema_decay=None).train(resume_from_checkpoint=True)  # which needs none
    assert "moving average" not in caplog.text
