"""
Checkpoints that are whole or not there.

A checkpoint is written into `_saving`, flushed to the disk, and renamed. `trainer_state.json` is written last, so a
folder of another program that has none was not finished. The Hub's uploads leave out names that begin with `_`.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

SAVING = "_saving"  # holds checkpoints that are being written
REPLACED = "_replaced"  # holds a checkpoint while another one takes its name
STATE_NAME = "trainer_state.json"
ROLLOUT_NAME = "rollout_{rank}.pt"  # the images of an iteration that is not finished


def staging_folder(final: str | os.PathLike) -> str:
    """Where a checkpoint is written before it gets its final name."""
    final = Path(final)
    return str(final.parent / SAVING / final.name)


def publish(final: str | os.PathLike) -> None:
    """
    Give a checkpoint that is written its final name. Killed at any moment, the final name has a whole checkpoint.

    Args:
        final (`str` or `os.PathLike`): The final name. A checkpoint that has this name already is replaced.
    """
    final, staged = Path(final), Path(staging_folder(final))
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    replaced = final.parent / REPLACED / final.name
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        os.rename(final, replaced)
    os.rename(staged, final)
    _flush(final.parent)
    shutil.rmtree(replaced.parent, ignore_errors=True)
    with contextlib.suppress(OSError):  # another rank may still be writing there
        os.rmdir(staged.parent)


def clean_up(folder: str | os.PathLike) -> None:
    """Remove what a killed save has left in a run's folder, and bring back a checkpoint that it was replacing."""
    folder = Path(folder)
    for replaced in (folder / REPLACED).glob("*"):
        if not (folder / replaced.name).exists():
            os.rename(replaced, folder / replaced.name)
    for name in (SAVING, REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)


def newest_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint in a run's folder. A warning names newer ones that are not whole."""
    if not os.path.isdir(folder):
        return None
    for checkpoint in reversed(sort_checkpoints(str(folder), PREFIX_CHECKPOINT_DIR)):
        if is_whole(checkpoint):
            return checkpoint
        logger.warning(f"{checkpoint} is not a whole checkpoint: its save was interrupted. It is passed over.")
    return None


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        return "global_step" in json.loads((Path(checkpoint) / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def find_checkpoint(given: str | os.PathLike | bool | None, output_dir: str | os.PathLike) -> str | None:
    """
    The checkpoint that a user's `resume_from_checkpoint` means.

    Args:
        given (`str`, `os.PathLike` or `bool`, *optional*): A checkpoint's folder, or `True` (or, from a command line,
            `"True"`) for the newest whole one in `output_dir`. `None` and `False` mean none.
        output_dir (`str` or `os.PathLike`): The run's folder.

    Raises:
        `FileNotFoundError`: If there is no such checkpoint, or it is not whole.
    """
    if isinstance(given, str) and given.lower() in ("true", "false") and not os.path.isdir(given):
        given = given.lower() == "true"
    if given is None or given is False:
        return None
    newest = newest_checkpoint(output_dir if given is True else Path(given).parent)
    if given is True:
        if newest is None:
            raise FileNotFoundError(
                f"`resume_from_checkpoint` must be None if there is no whole checkpoint in {os.fspath(output_dir)!r}, "
                "got True. Omit it to start from the beginning, or set `output_dir` to the run's folder."
            )
        return newest
    if not is_whole(given):
        found = f"the newest whole checkpoint beside it is {newest!r}" if newest else "there is none beside it"
        raise FileNotFoundError(
            f"`resume_from_checkpoint` must be the folder of a whole checkpoint, got {os.fspath(given)!r}, which has "
            f"no complete {STATE_NAME}; {found}. Pass True for the newest whole checkpoint in `output_dir`."
        )
    return os.fspath(given)


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
