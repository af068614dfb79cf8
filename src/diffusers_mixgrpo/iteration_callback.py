"""[`IterationCallback`]: what must happen between iterations, and not inside one."""

from typing import Any

from transformers import TrainerCallback


class IterationCallback(TrainerCallback):
    """
    Keeps evaluations and checkpoints at the ends of iterations.

    One that is due inside an iteration waits for its end: a checkpoint then never has to hold half-used rollouts, and
    a resumed run repeats an uninterrupted one exactly.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.evaluate = self.save = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.first_step = state.global_step

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate forwards the epoch to the sampler through some wrappers but not through all of them
        if self.trainer.prompt_sampler is not None:
            self.trainer.prompt_sampler.set_epoch(int(state.epoch or 0))

    def on_save(self, args, state, control, **kwargs):
        self.trainer.saved_step = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.evaluate |= control.should_evaluate
        self.save |= control.should_save
        at_end = state.global_step % args.optimizer_steps_per_iteration == 0 or state.global_step >= state.max_steps
        control.should_evaluate, control.should_save = self.evaluate and at_end, self.save and at_end
        if at_end:
            self.evaluate = self.save = False
        return control
