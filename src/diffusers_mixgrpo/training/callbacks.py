"""Callbacks: what must happen between iterations and not inside one, and the progress bar."""

from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from .interruptions import Interruptions
from .plan import PromptSampler


logger = logging.get_logger(__name__)


class IterationCallback(TrainerCallback):
    """
    Keeps evaluations and checkpoints at the ends of iterations.

    One that is due inside an iteration waits for its end: a checkpoint then never has to hold half-used rollouts, and
    a resumed run repeats an uninterrupted one exactly.

    An optimizer step is not interrupted: signals wait from its beginning until the step is counted and logged.

    Args:
        interruptions ([`Interruptions`]): The run's signals.

    Attributes:
        sampler ([`PromptSampler`], *optional*): The sampler of the training prompts; it is told the epoch.
        first_step (`int`, *optional*): Optimizer steps before this run; `None` until training begins.
        saved_step (`int`, *optional*): The step of this run's last checkpoint.
        is_updating (`bool`): Whether an optimizer step has begun and is not counted yet.
    """

    def __init__(self, interruptions: Interruptions) -> None:
        self.interruptions = interruptions
        self.sampler: PromptSampler | None = None
        self._steps_done = 0  # over all runs of this trainer
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self.first_step: int | None = None
        self.saved_step: int | None = None
        self.is_updating = False
        self._evaluation_is_due = False
        self._save_is_due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step = state.global_step
        if self._steps_done > state.global_step:
            logger.warning(
                f"Training starts at step {state.global_step} with weights and an optimizer that this trainer has "
                f"trained for {self._steps_done} steps already. To continue a run, pass `resume_from_checkpoint`; to "
                "start over, make a new trainer with a new pipeline."
            )
        self._steps_done = state.global_step
        if state.global_step >= state.max_steps:
            logger.warning(
                f"The run is finished: {state.global_step} of {state.max_steps} optimizer steps are done. Raise "
                "`max_steps` or `num_train_epochs` to train on."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.interruptions.hold()
        self.is_updating = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate forwards the epoch to the sampler through some wrappers but not through all of them
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.saved_step = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert isinstance(args, MixGRPOConfig)
        self.is_updating = False
        self._steps_done = state.global_step
        self._evaluation_is_due |= control.should_evaluate
        self._save_is_due |= control.should_save
        is_last = state.global_step >= state.max_steps
        at_end = is_last or state.global_step % args.optimizer_steps_per_iteration == 0
        control.should_evaluate = self._evaluation_is_due and at_end
        control.should_save = self._save_is_due and at_end
        if at_end:
            self._evaluation_is_due = False
            self._save_is_due = False
        return control


class RewardProgressCallback(ProgressCallback):
    """
    The Trainer's progress bar with the latest rewards and the window's place in it.

    The Trainer's own callback prints each log on a line of its own, which has some thirty entries here. They are all
    in the trackers and in `trainer.state.log_history`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        names = {"reward": "reward", "held-out": "eval_reward", "window": "window/start"}
        self._shown |= {label: f"{logs[name]:.3g}" for label, name in names.items() if name in logs}
        self.training_bar.set_postfix(self._shown, refresh=False)
