"""The folder of a real training run of the miniature pipeline, as the trainer leaves it, for tests of the report."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from helpers import PROMPTS, make_trainer, redness
from transformers import TrainerCallback

from diffusers_mixgrpo import MixGRPOTrainer
from diffusers_mixgrpo.core.advantages import combine_rewards
from diffusers_mixgrpo.mixgrpo_config import without_secrets


TEXTS = [row["prompt"] for row in PROMPTS]


def blueness(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
    """A reward that is never trained on: minus the redness."""
    return [-value for value in redness(prompts, images)]


class Recorder(TrainerCallback):
    """Keeps images of the fixed prompts, and the groups of the iteration, at the ends of iterations."""

    def __init__(self) -> None:
        self.trainer: MixGRPOTrainer | None = None
        self.records: list[tuple[int, list, list]] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._record(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % args.optimizer_steps_per_iteration == 0:
            self._record(state.global_step)

    def _record(self, step: int) -> None:
        samples = self.trainer.sample_images(TEXTS)
        self.records.append((step, samples, [] if step == 0 else self._groups()))

    def _groups(self) -> list[dict[str, Any]]:
        rollout = self.trainer.rollout
        size = self.trainer.args.num_generations
        rewards = combine_rewards(rollout.rewards, self.trainer.engine.reward_weights).view(-1, size)
        advantages = rollout.advantages.view(-1, size)
        groups = []
        for which, index in (("best", rewards.mean(1).argmax()), ("worst", rewards.mean(1).argmin())):
            first = int(index) * size
            groups.append(
                {
                    "which": which,
                    "prompt": rollout.rows[first]["prompt"],
                    "window_start": rollout.plan.window.start,
                    "pictures": rollout.images[first : first + size],
                    "rewards": rewards[index].tolist(),
                    "advantages": advantages[index].tolist(),
                }
            )
        return groups


def train_example(folder: Path, **changes: Any) -> Path:
    """Train for 8 steps in 4 iterations, with an evaluation every 4 steps, and write the files of a run."""
    recorder = Recorder()
    settings: dict[str, Any] = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    trainer = make_trainer(
        folder, eval_dataset=PROMPTS, eval_reward_funcs=blueness, callbacks=[recorder], **(settings | changes)
    )
    recorder.trainer = trainer
    trainer.train()
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(entry) + "\n" for entry in trainer.state.log_history]
    (folder / "history.jsonl").write_text("".join(lines))
    info = {
        "base_model": "miniature",
        "pipeline": type(trainer.pipe).__name__,
        "family": "flux",
        "reward_names": trainer.reward_names,
        "reward_weights": [1.0],
        "eval_reward_names": ["blueness"],
        "is_lora": True,
        "lora_rank": 4,
        "settings": without_secrets(trainer.args.to_dict()),
        "versions": {"torch": "2.0"},
        "num_processes": 1,
        "started": "2026-01-02T03:04:05",
    }
    (folder / "run.json").write_text(json.dumps(info))
    shutil.rmtree(folder / "images", ignore_errors=True)
    for step, samples, groups in recorder.records:
        _write_record(folder / "images", step, samples, groups)
    return folder


def _write_record(images: Path, step: int, samples: list, groups: list[dict[str, Any]]) -> None:
    name = f"step_{step:06d}"
    (images / name).mkdir(parents=True)
    record: dict[str, Any] = {"step": step, "samples": [], "groups": []}
    for index, (prompt, image) in enumerate(zip(TEXTS, samples, strict=True)):
        file = f"{name}/sample_{index:02d}.webp"
        image.save(images / file, lossless=True)
        reward = redness([prompt], [image])[0]
        sample = {"prompt": prompt, "seed": index, "file": file, "reward": reward, "rewards": {"redness": reward}}
        record["samples"].append(sample)
    for group in groups:
        entries = []
        scores = zip(group["pictures"], group["rewards"], group["advantages"], strict=True)
        for index, (image, reward, advantage) in enumerate(scores):
            file = f"{name}/{group['which']}_{index:02d}.webp"
            image.save(images / file, lossless=True)
            number = None if math.isnan(reward) else reward
            entry = {"file": file, "reward": number, "rewards": {"redness": number}, "advantage": advantage}
            entries.append(entry)
        shown = {key: group[key] for key in ("which", "prompt", "window_start")}
        record["groups"].append(shown | {"images": entries})
    (images / f"{name}.json").write_text(json.dumps(record))
