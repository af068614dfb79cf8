"""[`RewardProgressCallback`]: one progress bar that says how the reward stands."""

from transformers import ProgressCallback


class RewardProgressCallback(ProgressCallback):
    """
    The Trainer's progress bar with the latest reward and window in it.

    The Trainer's own prints each log as a line of its own, which here has some thirty entries; they are all in the
    trackers and in `trainer.state.log_history`.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {"reward": logs.get("reward"), "held-out": logs.get("eval_reward"), "window": logs.get("window/start")}
        self._shown = getattr(self, "_shown", {}) | {name: f"{v:.3g}" for name, v in shown.items() if v is not None}
        self.training_bar.set_postfix(self._shown, refresh=False)
