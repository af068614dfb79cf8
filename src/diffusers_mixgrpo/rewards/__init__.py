"""Rewards that people use, one in a file: callables `reward(prompts, images, **columns) -> list[float | None]`."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch


# Name -> where it is. Imported when asked for, so that one needs only the dependencies of the rewards one uses.
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
    A reward by its name.

    Args:
        name_or_path (`str`):
            One of `"hpsv2"`, `"pickscore"`, `"imagereward"`, `"clipscore"`, `"unifiedreward"`, `"vlm_judge"`,
            `"ocr"`, `"aesthetic"` and `"jpeg_compressibility"`; or a folder or Hub id (`owner/name`) of a CLIP or
            SigLIP model, which scores by the cosine of picture and prompt; or the URL of a reward server
            (`http://host:port/name`, see `examples/serve_rewards.py`); or `module:function`, a reward function of
            one's own, importable from where one works.
        kwargs: Passed to the reward; see its class. A `dtype` may be a name, as `"bfloat16"`.

    Raises:
        `ValueError`: If there is no such reward.
        `ImportError`: If what it needs is not installed; the message names the extra to install.
        `FileNotFoundError`: If its weights cannot be had.

    Example:

    ```python
    reward = load_reward("hpsv2", version="v2.0", device="cuda")
    scores = reward(["a cat"], [picture])
    ```
    """
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if name_or_path in NAMES:
        module, attribute = NAMES[name_or_path].split(":")
        return _make(getattr(importlib.import_module(f".{module}", __name__), attribute), name_or_path, kwargs)
    if name_or_path.startswith(("http://", "https://")):
        from .remote import RemoteReward

        return RemoteReward(name_or_path, **kwargs)
    module, colon, attribute = name_or_path.rpartition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), attribute]):
        return _make(_import_own(module, attribute, name_or_path), name_or_path, kwargs)
    if os.path.isdir(os.path.expanduser(name_or_path)) or name_or_path.count("/") == 1:
        from .clipscore import CLIPScoreReward

        return CLIPScoreReward(name_or_path, **kwargs)
    raise ValueError(
        f"`reward_funcs`: there is no reward {name_or_path!r}. Give one of {', '.join(NAMES)}, the folder or Hub id "
        "of a CLIP model, the URL of a reward server, or module:function."
    )


def _make(reward: Any, name: str, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """A class's object; a function as it is."""
    if isinstance(reward, type):
        return reward(**kwargs)
    if kwargs:
        raise ValueError(f"The reward {name!r} is a function and takes no arguments beforehand, got {kwargs}.")
    return reward


def _import_own(module: str, attribute: str, name: str) -> Callable[..., Any]:
    sys.path.insert(0, os.getcwd())  # one's own module next to where one works
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`reward_funcs`: there is no {name!r} ({error}). Is it importable from {os.getcwd()}?"
        ) from error
    finally:
        sys.path.pop(0)


__all__ = ["NAMES", "load_reward"]
