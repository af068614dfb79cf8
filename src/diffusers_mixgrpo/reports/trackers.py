"""
Sample images in the trackers of `report_to`, and what else they need to work with a diffusers model.

Transformers' callbacks send the scalars and the hyperparameters. Here their own handles are used, so that no tracker
is imported, and images go to the run that the scalars are in.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import (
    ClearMLCallback,
    CometCallback,
    DVCLiveCallback,
    MLflowCallback,
    SwanLabCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from ..training.samples import Sample, Samples
from .sample_grid import score_lines


logger = logging.get_logger(__name__)


class ReadableConfig(FrozenDict):
    """
    The configuration of a diffusers model with the two methods of a transformers one, which trackers call to log it.
    """

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2, sort_keys=True, default=str) + "\n"


def prepare_trackers(callbacks: Sequence[TrainerCallback], model: nn.Module, settings: MixGRPOConfig) -> None:
    """
    Make transformers' callbacks work with a diffusers model, before training too, and without secrets.

    Args:
        callbacks (`Sequence[TrainerCallback]`): The trainer's callbacks.
        model (`torch.nn.Module`): The model in training. Its `config` keeps its content.
        settings ([`MixGRPOConfig`]): The configuration.
    """
    model._internal_dict = ReadableConfig(model.config)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and getattr(callback, "logging_dir", "") is None:
            # Otherwise an evaluation before training would open a writer in the current folder for all of the run.
            callback.logging_dir = os.path.join(settings.output_dir, "runs", time.strftime("%b%d_%H-%M-%S"))
        if isinstance(callback, ClearMLCallback):
            _hide_secrets(callback)


def _hide_secrets(callback: ClearMLCallback) -> None:
    """ClearML's callback reads the arguments themselves; the others ask for `to_dict`, which has no secrets."""
    copy_arguments = callback._copy_training_args_as_hparams

    def copy_without_secrets(training_args: MixGRPOConfig, prefix: str) -> None:
        copy_arguments(training_args.without_secrets(), prefix)

    callback._copy_training_args_as_hparams = copy_without_secrets  # type: ignore[method-assign]


def send_samples(callbacks: Sequence[TrainerCallback], samples: Samples, grid: Image.Image) -> None:
    """
    Send images with their prompts and scores to each tracker among the callbacks. The first rank calls this.

    A tracker that cannot take them costs a warning, and not the run.
    """
    for callback in callbacks:
        send = next((send for kind, send in _SENDERS.items() if isinstance(callback, kind)), None)
        if send is None:
            continue
        try:
            send(callback, samples, grid)
        except Exception as error:
            logger.warning(f"Step {samples.step}: {type(callback).__name__} could not log images: {error!r}")


# ---- One function per tracker, which gets transformers' callback of it ----


def _to_tensorboard(callback: Any, samples: Samples, grid: Image.Image) -> None:
    callback.tb_writer.add_image("samples", np.asarray(grid), samples.step, dataformats="HWC")
    callback.tb_writer.add_text("samples", _table(samples.fixed), samples.step)


def _to_wandb(callback: Any, samples: Samples, grid: Image.Image) -> None:
    wandb = callback._wandb
    images = [wandb.Image(sample.image, caption=caption) for sample, caption in _captioned(samples.fixed)]
    wandb.log({"samples/grid": wandb.Image(grid), "samples/images": images, "train/global_step": samples.step})


def _to_trackio(callback: Any, samples: Samples, grid: Image.Image) -> None:
    trackio = callback._trackio
    rows = [
        {"prompt": sample.prompt, "seed": sample.seed, "image": trackio.Image(sample.image, caption=caption)}
        | dict(scores)
        for (sample, caption), scores in zip(_captioned(samples.fixed), score_lines(samples.fixed), strict=True)
    ]
    table = trackio.Table(data=rows)
    trackio.log({"samples/grid": trackio.Image(grid), "samples/table": table, "train/global_step": samples.step})


def _to_mlflow(callback: Any, samples: Samples, grid: Image.Image) -> None:
    mlflow = callback._ml_flow
    mlflow.log_image(grid, key="samples", step=samples.step, synchronous=True)  # not after the run has ended
    mlflow.log_text(_table(samples.fixed), f"samples/step_{samples.step:06d}.md")


def _to_comet(callback: Any, samples: Samples, grid: Image.Image) -> None:
    experiment = callback._experiment
    if experiment is None:  # switched off by COMET_MODE
        return
    experiment.log_image(grid, name="samples", step=samples.step)
    experiment.log_text(_table(samples.fixed), step=samples.step)


def _to_clearml(callback: Any, samples: Samples, grid: Image.Image) -> None:
    logger = callback._clearml_task.get_logger()
    logger.report_image("samples", "grid", iteration=samples.step, image=grid)
    logger.report_text(_table(samples.fixed), print_console=False)


def _to_swanlab(callback: Any, samples: Samples, grid: Image.Image) -> None:
    swanlab = callback._swanlab
    images = [swanlab.Image(sample.image, caption=caption) for sample, caption in _captioned(samples.fixed)]
    swanlab.log({"samples/grid": swanlab.Image(grid), "samples/images": images}, step=samples.step)


def _to_dvclive(callback: Any, samples: Samples, grid: Image.Image) -> None:
    callback.live.log_image(f"samples/step_{samples.step:06d}.png", grid)


# DagsHub's callback is MLflow's.
_SENDERS: dict[type[TrainerCallback], Callable[[Any, Samples, Image.Image], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    TrackioCallback: _to_trackio,
    MLflowCallback: _to_mlflow,
    CometCallback: _to_comet,
    ClearMLCallback: _to_clearml,
    SwanLabCallback: _to_swanlab,
    DVCLiveCallback: _to_dvclive,
}


def _captioned(samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    captioned = []
    for sample, lines in zip(samples, score_lines(samples), strict=True):
        scores = ", ".join(f"{name} {value}" for name, value in lines)
        captioned.append((sample, f"{sample.prompt} (seed {sample.seed}): {scores}"))
    return captioned


def _table(samples: Sequence[Sample]) -> str:
    """Prompts and scores in Markdown, one row per image."""
    scores = score_lines(samples)
    names = [name for name, _ in scores[0]]
    rows = [["prompt", "seed", *names], ["---"] * (2 + len(names))]
    for sample, lines in zip(samples, scores, strict=True):
        prompt = " ".join(sample.prompt.split()).replace("|", "\\|")
        rows.append([prompt, str(sample.seed), *(value for _, value in lines)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
