"""What happens between iterations, and the progress bar."""

import pytest
from helpers import small_config
from transformers import TrainerControl, TrainerState

from diffusers_mixgrpo.training.callbacks import IterationCallback, RewardProgressCallback
from diffusers_mixgrpo.training.interruptions import Interruptions
from diffusers_mixgrpo.training.plan import PromptSampler


def run(settings, due, steps, callback):
    """The steps with an evaluation, and those with a checkpoint, when both are asked for at the steps in `due`."""
    evaluated, saved = [], []
    for step in range(1, steps + 1):
        state = TrainerState(global_step=step, max_steps=steps)
        control = TrainerControl(should_evaluate=step in due, should_save=step in due)
        control = callback.on_step_end(settings, state, control)
        if control.should_evaluate:
            evaluated.append(step)
        if control.should_save:
            saved.append(step)
    return evaluated, saved


@pytest.mark.parametrize(
    "due, done",
    [
        ([4, 8], [4, 8]),
        ([3, 5, 6], [4, 8]),  # they wait for the end of their iteration, and there is one for several
        ([2], [4]),
        ([9], [10]),  # the last step ends a run even inside an iteration
        ([], []),
    ],
)
def test_evaluations_and_checkpoints_wait_for_the_end_of_an_iteration(tmp_path, due, done):
    settings = small_config(tmp_path, per_device_train_batch_size=2, steps_per_generation=4)
    assert settings.optimizer_steps_per_iteration == 4
    assert run(settings, due, steps=10, callback=IterationCallback(Interruptions())) == (done, done)


def test_the_sampler_is_told_the_epoch_and_the_steps_are_noted(tmp_path):
    settings = small_config(tmp_path)
    sampler = PromptSampler(5, 2, 1)
    callback = IterationCallback(Interruptions())
    callback.sampler = sampler
    callback.on_train_begin(settings, TrainerState(global_step=6, max_steps=8), TrainerControl())
    callback.on_epoch_begin(settings, TrainerState(epoch=3.0), TrainerControl())
    callback.on_save(settings, TrainerState(global_step=8), TrainerControl())
    assert (callback.first_step, sampler.epoch, callback.saved_step) == (6, 3, 8)
    IterationCallback(Interruptions()).on_epoch_begin(
        settings, TrainerState(epoch=3.0), TrainerControl()
    )  # without training prompts


def test_an_optimizer_step_is_known_until_it_is_counted(tmp_path):
    settings = small_config(tmp_path)
    callback = IterationCallback(Interruptions())
    assert not callback.is_updating
    callback.on_pre_optimizer_step(settings, TrainerState(), TrainerControl())
    assert callback.is_updating
    callback.on_step_end(settings, TrainerState(global_step=1, max_steps=2), TrainerControl())
    assert not callback.is_updating


def test_the_progress_bar_keeps_the_latest_of_each(tmp_path, capfd):
    settings = small_config(tmp_path)
    state = TrainerState(max_steps=4, is_world_process_zero=True)
    callback = RewardProgressCallback()
    callback.on_log(settings, state, TrainerControl(), logs={"reward": 1.0})  # before there is a bar
    callback.on_train_begin(settings, state, TrainerControl())
    callback.on_log(settings, state, TrainerControl(), logs={"reward": 0.12345, "window/start": 3.0, "kl": 7.0})
    callback.on_log(settings, state, TrainerControl(), logs={"eval_reward": 0.5})
    callback.training_bar.refresh()
    shown = capfd.readouterr().err
    assert "reward=0.123, window=3, held-out=0.5" in shown and "kl" not in shown
