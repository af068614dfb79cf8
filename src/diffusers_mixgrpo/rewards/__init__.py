"""Built-in rewards, one per file. Each is a callable `reward(prompts, images, **columns) -> list[float | None]`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch


# Name -> module and attribute. Imported on first use, so that each reward needs only its own dependencies.
NAMES = {
    "hpsv2": "hpsv2:HPSv2Reward",
    "pickscore": "pickscore:PickScoreReward",
    "imagereward": "imagereward:ImageReward",
    "clipscore": "clipscore:CLIPScoreReward",
    "unifiedreward": "unifiedreward:UnifiedReward",
    "vlm_judge": "vlm_judge:VLMJudge",
    "ocr": "ocr:OCRReward",
    "aesthetic": "aesthetic:AestheticReward",
    "jpeg_compressibility": "jpeg_compressibility:jpeg_compressibility",
}


def load_reward(name_or_path: str, **kwargs: Any) -> Callable[..., Any]:
    """
    Load a reward by its name.

    Args:
        name_or_path (`str`):
            One of:

            - a built-in reward: `"hpsv2"`, `"pickscore"`, `"imagereward"`, `"clipscore"`, `"unifiedreward"`,
              `"vlm_judge"`, `"ocr"`, `"aesthetic"` or `"jpeg_compressibility"`;
            - `module:function`, such as `"my_rewards:my_reward"` or `"diffusers_mixgrpo.toy:toy_reward"`. The module
              must be installed or in the current working directory. A class is instantiated with `kwargs`;
            - the URL of a reward server (`http://host:port/name`, see `diffusers-mixgrpo serve-rewards`);
            - the folder or Hub id (`owner/name`) of a CLIP or SigLIP model, which scores by the cosine similarity of
              image and prompt.
        kwargs:
            Arguments of the reward; see its class. A `dtype` may be given by name, such as `"bfloat16"`.

    Returns:
        `Callable`: the reward.

    Raises:
        `ValueError`: If there is no such reward.
        `ImportError`: If a package that the reward needs is not installed; the message names the extra to install.
        `OSError`: If the reward's weights cannot be loaded.

    Example:

    ```python
    reward = load_reward("hpsv2", version="v2.0", device="cuda")
    scores = reward(["a cat"], [image])
    ```
    """
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if name_or_path in NAMES:
        module, attribute = NAMES[name_or_path].split(":")
        builtin = getattr(importlib.import_module(f".{module}", __name__), attribute)
        return _instantiate(builtin, name_or_path, kwargs)
    if name_or_path.startswith(("http://", "https://")):
        from .remote import RemoteReward

        return RemoteReward(name_or_path, **kwargs)
    module, colon, attribute = name_or_path.rpartition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), attribute]):
        return _instantiate(_import_attribute(module, attribute), name_or_path, kwargs)
    if os.path.isdir(os.path.expanduser(name_or_path)) or name_or_path.count("/") == 1:
        from .clipscore import CLIPScoreReward

        return CLIPScoreReward(name_or_path, **kwargs)
    raise ValueError(
        f"`reward_funcs` must be one of {', '.join(NAMES)}, the folder or Hub id of a CLIP model, the URL of a reward "
        f"server, or module:function, got {name_or_path!r}. Check the spelling, or pass the function itself."
    )


def _instantiate(reward: Callable[..., Any], name: str, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """A reward that is a class is instantiated; a function is returned as it is."""
    if isinstance(reward, type):
        return reward(**kwargs)
    if kwargs:
        raise ValueError(
            f"`reward_init_kwargs` must be empty for {name!r}, which is a function, got {', '.join(kwargs)}. Use a "
            "class whose `__init__` takes these arguments."
        )
    return reward


def _import_attribute(module: str, attribute: str) -> Callable[..., Any]:
    folder = os.getcwd()
    sys.path.insert(0, folder)  # so that a module in the working directory is found
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`reward_funcs` must be importable, got '{module}:{attribute}' ({error}). Install the module, or run "
            f"from the folder that contains it instead of {folder}."
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(reward):
        raise ValueError(
            f"`reward_funcs` must be callable, got '{module}:{attribute}', of type {type(reward).__name__}. Name a "
            "function or a class."
        )
    return reward


__all__ = ["NAMES", "load_reward"]
