"""
[`SavingTrainer`]: a [`~transformers.Trainer`] that saves a pipeline's trained weights as diffusers loads them, in
checkpoints that are whole or not there, and loses nothing when training ends with an error.
"""

import os
import shutil
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from ..mixgrpo_config import MixGRPOConfig
from ..policies.adapters import TrainedWeights
from ..policies.trained_weights import (
    EMA_FOLDER,
    gather_trained_weights,
    load_trained_weights,
    remove_trained_weights,
    save_trained_weights,
)
from ..rewards.runner import RewardError
from .callbacks import IterationCallback
from .checkpoints import ROLLOUT_NAME, STATE_NAME, clean_up, find_checkpoint, publish, staging_folder
from .ema import EMAWeights
from .engine import Engine, Rollout
from .faults import FaultBoard
from .interruptions import Interruptions, StopOnAllRanks
from .nonfinite import NonFiniteError, finite_weights


logger = logging.get_logger(__name__)

# Errors that all ranks raise together
ON_ALL_RANKS = (RewardError, NonFiniteError, StopOnAllRanks)
_PUBLISHED = "published"


class SavingTrainer(Trainer):
    """
    The part of a trainer that saves and loads. A subclass sets the attributes.

    Attributes:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline in training.
        weights ([`~policies.preparation.TrainedWeights`]): Which weights of its transformer are trained.
        engine ([`~training.engine.Engine`]): Knows the trained parameters, and whether they are sharded.
        ema ([`~training.ema.EMAWeights`], *optional*): Their moving average, saved beside them.
        rollout ([`~training.engine.Rollout`], *optional*): The images of an iteration that is not finished.
        interruptions ([`~training.interruptions.Interruptions`]): Signals, which wait during an optimizer step.
    """

    args: MixGRPOConfig
    pipe: DiffusionPipeline
    weights: TrainedWeights
    engine: Engine
    ema: EMAWeights | None
    rollout: Rollout | None
    interruptions: Interruptions
    _iteration_callback: IterationCallback  # knows which steps were begun and saved
    _faults: FaultBoard  # of the present run

    # ---- Weights ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Overridden since the Trainer saves nothing with FSDP and a sharded state dict, nor with ZeRO-3 by default.
        if not self.engine.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Overridden to write the files that diffusers loads. All ranks come here and gather, and one of them writes.
        if self.engine.is_sharded:
            state_dict = gather_trained_weights(self.pipe.transformer, keep=self.args.should_save)
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        save_trained_weights(self.pipe, output_dir, self.weights, state_dict)
        if self.ema is not None:
            with self.ema.applied():
                save_trained_weights(self.pipe, os.path.join(output_dir, EMA_FOLDER), self.weights)
        else:
            remove_trained_weights(os.path.join(output_dir, EMA_FOLDER))  # of an earlier run
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Overridden so that a checkpoint is whole or not there, and never holds weights that are not finite.
        self._release_signals()
        if not all(self.engine.gather(torch.tensor([finite_weights(self.engine.trained_parameters)]))):
            raise NonFiniteError(
                f"The weights are infinite or NaN after {self.state.global_step} optimizer steps, and are not saved. "
                "Resume from the last checkpoint with a lower `learning_rate`."
            )
        self.store_flos()
        final = self._checkpoint_folder(self.state.global_step)
        self._write_checkpoint(final)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            publish(final)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and os.path.isdir(staging_folder(final)):
            publish(final)  # a machine whose disk the first process does not see
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _checkpoint_folder(self, step: int) -> str:
        return os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def _write_checkpoint(self, final: str) -> None:
        """Write this rank's files of a checkpoint into its staging folder. Those of sharded weights need all ranks."""
        staged = staging_folder(final)
        try:
            self.save_model(staged, _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(staged)
                self._save_scaler(staged)
                self._write_own_state(staged)
            best = self._checkpoint_folder(self.state.best_global_step or -1)
            if best == final or os.path.isdir(best):
                self.state.best_model_checkpoint = best
            if self.args.should_save:
                self._export_callbacks()
                self.state.save_to_json(os.path.join(staged, STATE_NAME))
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)  # on a full disk, its space may be what is missing
            raise

    def _write_own_state(self, folder: str) -> None:
        """Write what each rank has of its own: the state of its random numbers, and an iteration's images."""
        self._save_rng_state(folder)
        if self.state.global_step % self.args.optimizer_steps_per_iteration and self.rollout is not None:
            path = os.path.join(folder, ROLLOUT_NAME.format(rank=self.args.process_index))
            torch.save(self.rollout.state_dict(), path)

    def _export_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer's, where `_load_callback_state` finds it."""
        states: dict[str, list[dict[str, Any]]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        exported = {name: values[0] if len(values) == 1 else values for name, values in states.items()}
        self.state.stateful_callbacks = exported  # type: ignore[assignment]  # its annotation is that of the argument

    def _release_signals(self) -> None:
        """Raise the exception of a signal that came during the optimizer step."""
        # Sharded weights can only be saved by all ranks together, so signals wait until all ranks know of them.
        if not self.engine.is_sharded:
            self.interruptions.release()

    # ---- Resuming ----

    def _find_checkpoint(self, given: str | bool | None) -> str | None:
        """The checkpoint to resume from, chosen by the first rank for all of them."""
        if self.is_local_process_zero():
            clean_up(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        found = [find_checkpoint(given, self.args.output_dir) if self.is_world_process_zero() else None]
        return broadcast_object_list(found)[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Overridden to read the files of `_save`.
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_trained_weights(self.pipe, resume_from_checkpoint, self.weights)
        if self.ema is None:
            return
        folder = os.path.join(resume_from_checkpoint, EMA_FOLDER)
        if os.path.isdir(folder):
            with self.ema.applied():
                load_trained_weights(self.pipe, folder, self.weights)
        else:
            self.ema.restart()
            logger.warning(
                f"{resume_from_checkpoint} has no moving average: it was saved without `ema_decay`. The average "
                "starts at the weights of the checkpoint."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Overridden to say what the Trainer passes over in silence.
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, name)):
            logger.warning(
                f"The checkpoint has no {name}: it is one of another number of processes than {self.args.world_size}. "
                "Resuming is not exact: this process draws other random numbers, and prompts are shared differently."
            )
        super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model_wrapped)

    # ---- After an error ----

    def _save_after(self, error: BaseException) -> None:
        """Save a checkpoint to resume from after `error`, and say so in the error."""
        step = self.state.global_step
        callback = self._iteration_callback
        if callback.first_step is None or step <= callback.first_step:
            return  # nothing was trained that an older checkpoint does not have
        folder = self._checkpoint_folder(step)
        is_saved = callback.saved_step == step
        reason = f"optimizer step {step + 1} was not finished" if callback.is_updating else ""
        if not is_saved and not reason:
            try:
                is_saved = self._save_together(error) or self._save_alone(folder)
                reason = "they are spread over processes, of which one has failed"
            except Exception as failure:
                reason = repr(failure)
        note = f"The weights after {step} optimizer steps could not be saved: {reason}."
        if is_saved:
            note = (
                f"The weights after {step} optimizer steps are saved in {folder}. Resume with "
                f"trainer.train(resume_from_checkpoint={folder!r})."
            )
        error.add_note(note)
        if not isinstance(error, Exception):
            logger.warning(f"Stopped by {error!r}. {note}")  # Python shows no notes of SystemExit

    def _save_together(self, error: BaseException) -> bool:
        """Save as in training, if all ranks have come to this error."""
        if not isinstance(error, ON_ALL_RANKS):
            return False
        self._save_checkpoint(self.model_wrapped, trial=None)
        return True

    def _save_alone(self, folder: str) -> bool:
        """Save without collectives, which ranks that have failed may not answer: each writes what it has."""
        if self.engine.is_sharded:
            return False
        if not finite_weights(self.engine.trained_parameters):
            raise NonFiniteError("they are infinite or NaN")
        staged = staging_folder(folder)
        if self.is_world_process_zero():
            self._write_checkpoint(folder)
            publish(folder)
            self._faults.announce(_PUBLISHED)
        elif not self.args.save_only_model:
            own = f"{staged}-{self.args.process_index}"
            self._write_own_state(own)
            # The first rank may be done, or may come to its own error only when this process has ended.
            shutil.copytree(own, folder if self._faults.wait_for(_PUBLISHED) else staged, dirs_exist_ok=True)
            shutil.rmtree(own)
        return True
