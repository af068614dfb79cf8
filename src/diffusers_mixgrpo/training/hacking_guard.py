"""
[`HackingGuard`]: notices that a policy exploits its reward, from what was not trained on.

The first evaluation of a run is its baseline. A later one is suspicious where the trained reward has risen on held-out
prompts and, at the same time, a reward that is never trained on has fallen or a statistic of the images has moved.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..core.advantages import scored_std
from ..mixgrpo_config import MixGRPOConfig


RISE = 2  # standard errors of the difference by which the trained reward must have risen
CHANGE = 3  # standard errors of the difference by which another reward must have fallen, or a statistic moved
SHIFT = 1  # standard deviations over the baseline's prompts by which a statistic must have moved

REWARD = "reward"
"""The trained reward."""
UNTRAINED = "rewards/"
"""Start of the names of rewards that are never trained on."""
IMAGES = "images/"
"""Start of the names of image statistics."""

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation and number of the values of a series, one per prompt, in an evaluation."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> "Summary":
        """Of values of shape `(n,)`, NaN where there is none."""
        count = int((~values.isnan()).sum())
        return cls(float(values.nanmean()), float(scored_std(values, dims=(0,))), count)

    def errors_from(self, before: "Summary") -> float:
        """
        How far the mean lies above that of `before`, in standard errors of the difference; below it if negative.

        The prompts are the same, but their pairs are not kept: the errors add up as if the prompts were others. 0
        where there is no standard error, for fewer than two values.
        """
        if min(self.count, before.count) < 2:
            return 0.0
        error = math.sqrt(self.std**2 / self.count + before.std**2 / before.count)
        difference = self.mean - before.mean
        if error > 0:
            return difference / error
        return math.copysign(math.inf, difference) if difference else 0.0


def find_alarms(before: Mapping[str, Summary], now: Mapping[str, Summary]) -> list[str]:
    """
    What speaks for an exploited reward, each a phrase with the numbers before and after; empty if nothing does.

    Nothing does unless the trained reward rose by more than `RISE` standard errors of the difference. Then it is a
    held-out reward that fell by more than `CHANGE` of its standard errors, and an image statistic whose mean moved by
    more than `SHIFT` standard deviations over the baseline's prompts and by more than `CHANGE` standard errors.

    Args:
        before, now (`dict[str, Summary]`): The series of the baseline and of a later evaluation, by name. Those that
            only one of them has are passed over.
    """
    if not now[REWARD].errors_from(before[REWARD]) > RISE:  # NaN is no rise
        return []
    phrases = []
    for name in before.keys() & now.keys() - {REWARD}:
        first, last = before[name], now[name]
        errors = last.errors_from(first)
        numbers = f"from {first.mean:.3g} to {last.mean:.3g}"
        if name.startswith(UNTRAINED) and errors < -CHANGE:
            phrases.append(f"the reward `{name.removeprefix(UNTRAINED)}`, which is not trained on, fell {numbers}")
        moved = abs(last.mean - first.mean) > SHIFT * first.std and abs(errors) > CHANGE
        if name.startswith(IMAGES) and moved:
            verb = "rose" if errors > 0 else "fell"
            statistic = name.removeprefix(IMAGES)
            phrases.append(f"`{statistic}` of the images {verb} {numbers} (standard deviation {first.std:.2g})")
    return sorted(phrases)


class HackingGuard(TrainerCallback, ExportableState):
    """
    Compares the evaluations of a run with its first one, see [`find_alarms`], and warns or stops the training.

    Evaluations are compared by the prefix of their metrics, so several evaluation datasets each have a baseline of
    their own. Baselines are saved with the trainer's state, in checkpoints too: a handful of numbers per series.

    Attributes:
        baselines (`dict[str, dict[str, list[float]]]`): Mean, standard deviation and count of each series in the first
            evaluation, by prefix and name.
    """

    def __init__(self) -> None:
        self.baselines: dict[str, dict[str, list[float]]] = {}
        self._stops = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"baselines": self.baselines}}

    def judge(
        self, prefix: str, series: Mapping[str, Tensor], settings: MixGRPOConfig, state: TrainerState
    ) -> list[str]:
        """
        The alarms of an evaluation, after a warning if there are any. The first of a prefix is the baseline.

        Args:
            prefix (`str`): The prefix of the evaluation's metrics.
            series (`dict[str, torch.Tensor]`): The values of each series, one per prompt: `"reward"`, `"rewards/..."`
                of rewards that are not trained on, and `"images/..."` of image statistics.
            settings ([`MixGRPOConfig`]): The configuration.
            state ([`~transformers.TrainerState`]): The trainer's state.
        """
        now = {name: Summary.of(values) for name, values in series.items()}
        if prefix not in self.baselines:
            self.baselines[prefix] = {name: list(astuple(summary)) for name, summary in now.items()}
            return []
        before = {name: Summary(mean, std, int(count)) for name, (mean, std, count) in self.baselines[prefix].items()}
        alarms = find_alarms(before, now)
        self._stops |= bool(alarms) and settings.hacking_guard == "stop"
        if alarms and state.is_world_process_zero:
            folder = os.path.join(settings.output_dir, "images")
            place = "look at images (`trainer.sample_images`, or `logging_images_steps`)"
            if settings.logging_images_steps:
                place = f"look at the images in {folder}"
            logger.warning(
                f"Step {state.global_step}: `{prefix}_reward` rose from {before[REWARD].mean:.3g} to "
                f"{now[REWARD].mean:.3g} on held-out prompts, while {'; '.join(alarms)}. The policy may be exploiting "
                f"the reward: {place}, lower `learning_rate`, add `beta`, or weigh in another reward."
                f"{_farewell(state) if self._stops else ''}"
            )
        return alarms

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stops = False
        # The state is the checkpoint's after a resume. The Trainer restores callbacks from it only when told to.
        saved: Any = state.stateful_callbacks  # a dict by now, whatever its annotation
        if type(self).__name__ in saved:
            self.baselines = saved[type(self).__name__]["attributes"]["baselines"]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._stops:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"
        return control


def _farewell(state: TrainerState) -> str:
    best = state.best_model_checkpoint
    found = f"The best checkpoint without an alarm is {best}." if best else "There is no checkpoint without an alarm."
    return f' Training stops here (hacking_guard="stop"). {found}'
