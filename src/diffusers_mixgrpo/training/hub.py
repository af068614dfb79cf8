"""
[`HubTrainer`]: pushes to the Hub, last and without a loss.

The repository is opened before anything large is loaded. A push comes when all files are on the disk, and if it fails,
its error names their folder and the command that pushes it later.
"""

import os
import shlex
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, logging
from transformers.utils.hub import hf_api

from ..mixgrpo_config import MixGRPOConfig
from ..policies.trained_weights import LORA_WEIGHTS_NAME, TRANSFORMER_FOLDER, copy_trained_weights
from .saving import SavingTrainer


logger = logging.get_logger(__name__)

# Files of a run's folder that are not pushed: unfinished ones, and checkpoints
NOT_PUSHED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", "*.part")


@dataclass(frozen=True)
class Repository:
    """
    Where to push a folder to.

    Args:
        name (`str`): `owner/name`, or a name in the token's own account.
        token (`str`, *optional*): The token. Defaults to the login.
        private (`bool`, *optional*): Whether a new repository is private. Defaults to the account's setting.
        revision (`str`, *optional*): The branch. Defaults to the main one.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None

    def create(self) -> str:
        """
        Create the repository, unless it exists, and return its name with the owner.

        Raises:
            `Exception`: As `huggingface_hub` raises it, if the Hub refuses or cannot be reached.
        """
        name = hf_api().create_repo(self.name, token=self.token, private=self.private, exist_ok=True).repo_id
        try:
            hf_api().auth_check(name, token=self.token, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):  # others may come from a Hub that has no such check
                raise
        return name

    def open(self) -> str | None:
        """
        As [`create`], but `None` with a warning if the Hub cannot be reached now.

        Raises:
            `ValueError`: If the Hub refuses the token or the name: it would do so again after training.
        """
        try:
            return self.create()
        except HFValidationError as error:
            raise ValueError(
                f"`hub_model_id` must be a name that the Hub allows (`owner/name`), got {self.name!r}: {error}"
            ) from error
        except Exception as error:  # a network fails in many ways, and none of them should prevent training
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
            if 400 <= status < 500 and status not in (408, 429):  # timeout, too many requests
                raise ValueError(
                    f"`hub_model_id` must be a repository that you may write to, got {self.name!r}: "
                    f"{_in_a_line(error)} Log in with `hf auth login`, pass a `hub_token` with write permission, or "
                    "choose another name."
                ) from error
            logger.warning(
                f"The Hub cannot be reached: {_in_a_line(error)} Training goes on, and {self.name} is created when "
                "the results are pushed."
            )
            return None

    def push(self, folder: str, message: str, leave_out: tuple[str, ...]) -> CommitInfo:
        """Push a folder, without the files whose names match `leave_out`."""
        return hf_api().upload_folder(**self._upload(folder, message, leave_out))

    def start_push(
        self, folder: str, message: str, leave_out: tuple[str, ...] = (), path: str | None = None
    ) -> "Future[CommitInfo]":
        """As [`push`], in the background, and into the folder `path` of the repository."""
        return hf_api().upload_folder(
            **self._upload(folder, message, leave_out), path_in_repo=path, run_as_future=True
        )

    def _upload(self, folder: str, message: str, leave_out: tuple[str, ...]) -> dict[str, Any]:
        return {
            "repo_id": self.name,
            "folder_path": folder,
            "commit_message": message,
            "token": self.token,
            "revision": self.revision,
            "ignore_patterns": list(leave_out),
        }

    def push_later(self, folder: str, leave_out: tuple[str, ...], error: BaseException) -> str:
        """What to say when a push has failed: why, where everything is, and the command that pushes it later."""
        folder = os.path.abspath(folder)
        command = ["hf", "upload", self.name, folder, "."]
        for pattern in leave_out:
            command += ["--exclude", pattern]
        if self.revision is not None:
            command += ["--revision", self.revision]
        if self.private:
            command.append("--private")
        return (
            f"The results could not be pushed to {self.name}: {_in_a_line(error)} They are all saved in {folder}. To "
            f"push them later (log in with `hf auth login` first):\n{shlex.join(command)}"
        )


def repository_of(settings: MixGRPOConfig, name: str | None = None) -> Repository:
    """The repository of a run: `name`, or that of the configuration, or the output folder's name."""
    name = name or settings.hub_model_id or os.path.basename(os.path.abspath(settings.output_dir))
    return Repository(name, settings.hub_token, settings.hub_private_repo, settings.hub_revision)


def _in_a_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if text.endswith(".") else f"{text}."


class HubTrainer(SavingTrainer):
    """The part of a trainer that pushes to the Hub. A subclass writes the card, and opens the repository first."""

    hub_model_id: str | None  # type: ignore[assignment]  # None until a repository is opened
    push_in_progress: PushInProgress | None  # type: ignore[assignment]
    _opened: str | None  # the repository's name with its owner, if it was opened before training

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Overridden since the Trainer comes here when the pipeline is loaded, and would fail without a connection.
        self.hub_model_id = self._opened
        self.push_in_progress = None

    def push_to_hub(  # type: ignore[override]  # other ranks than the first return nothing
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """
        Push `output_dir`: the weights, the card and all other results in it, without checkpoints.

        The weights and the card are written before the first network call, so that a push that fails loses nothing.

        Args:
            commit_message (`str`, *optional*): The commit's message.
            blocking (`bool`, defaults to `True`): Whether to wait for the end. If not, a failure is a warning.
            token (`str`, *optional*): Defaults to `hub_token`, and then to the login.
            revision (`str`, *optional*): The branch. Defaults to `hub_revision`, and then to the main one.
            private (`bool`, *optional*): Whether a new repository is private. Defaults to `hub_private_repo`.
            kwargs: Arguments of `create_model_card`.

        Returns:
            `huggingface_hub.CommitInfo`, with `blocking=False` a future of it, and `None` on all ranks but the first.

        Raises:
            `RuntimeError`: If the push fails. It says where everything is, and which command pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        folder = self.args.output_dir
        message = commit_message or "End of training"
        own = repository_of(self.args, self.hub_model_id)
        private = own.private if private is None else private
        repository = Repository(own.name, token or own.token, private, revision or own.revision)
        try:
            self._finish_current_push()
            if self.hub_model_id is None:
                repository = replace(repository, name=repository.create())
                self.hub_model_id = repository.name
                self.create_model_card(**kwargs)  # which names the repository, now with its owner
            if blocking:
                return repository.push(folder, message, self._not_pushed)
            push = repository.start_push(folder, message, self._not_pushed)
        except Exception as error:
            raise RuntimeError(repository.push_later(folder, self._not_pushed, error)) from error
        push.add_done_callback(self._warn_if_failed)
        return push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Overridden since the Trainer copies files of its own names, ignores a failed push, and needs a connection.
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        jobs: Any = [] if self.push_in_progress is None else self.push_in_progress.jobs
        running = [job for job in jobs if not job.done()]
        if running and not args.hub_always_push:
            return  # files that are being pushed must not change
        self.callback_handler.on_push_begin(args, self.state, self.control)
        pushes: list[Future[CommitInfo]] = []
        try:
            copy_trained_weights(checkpoint_folder, args.output_dir, self.weights)
            shutil.copy(os.path.join(checkpoint_folder, TRAINING_ARGS_NAME), args.output_dir)
            if self.hub_model_id is None:
                self.hub_model_id = repository_of(args).create()
            self._start_pushes(checkpoint_folder, repository_of(args, self.hub_model_id), pushes)
        except Exception as error:  # the checkpoint is on the disk, and the next push has all that this one would have
            self._warn(error)
        for push in pushes:
            push.add_done_callback(self._warn_if_failed)
        self.push_in_progress = PushInProgress([*running, *pushes])  # type: ignore[arg-type]  # annotated wrongly

    def _start_pushes(
        self, checkpoint_folder: str, repository: Repository, pushes: "list[Future[CommitInfo]]"
    ) -> None:
        message = f"Training in progress, step {self.state.global_step}"
        pushes.append(repository.start_push(self.args.output_dir, message, self._not_pushed))
        strategy = self.args.hub_strategy
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = strategy == HubStrategy.CHECKPOINT
            path = "last-checkpoint" if is_last else os.path.basename(checkpoint_folder)
            pushes.append(repository.start_push(checkpoint_folder, f"{message}, checkpoint", path=path))

    def _warn_if_failed(self, push: "Future[CommitInfo]") -> None:
        error = push.exception()
        if error is not None:
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        logger.warning(
            repository_of(self.args, self.hub_model_id).push_later(self.args.output_dir, self._not_pushed, error)
        )

    @property
    def _not_pushed(self) -> tuple[str, ...]:
        """What is not pushed, among it weights of the other kind that an earlier run has left in the folder."""
        return (*NOT_PUSHED, f"{TRANSFORMER_FOLDER}/*" if self.weights.is_lora else LORA_WEIGHTS_NAME)
