"""A tiny FLUX that trains on a laptop: a complete 6 MB pipeline, its prompts, and a verifiable reward.

```python
from diffusers_mixgrpo import toy

pipe = toy.load()
image = pipe("a small red circle at the top on gray").images[0]
toy.toy_reward(["a small red circle at the top on gray"], [image])
```

The pipeline was pretrained by `examples/build_toy_flux.py` on captions with random mistakes, so it renders well but
follows prompts poorly; RL closes that gap. All of its classes are those of FLUX.1-dev. Configurations name the rewards
as `diffusers_mixgrpo.toy:toy_reward`, `diffusers_mixgrpo.toy:wholly_right` and `diffusers_mixgrpo.toy:extra_objects`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from .reward import Judgment, extra_objects, judge, toy_reward, wholly_right
from .scenes import SIZE, Scene, all_captions, caption, draw, is_held_out, parse


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


__all__ = [
    "Judgment",
    "Scene",
    "SIZE",
    "caption",
    "draw",
    "extra_objects",
    "judge",
    "load",
    "parse",
    "path",
    "prompts",
    "toy_reward",
    "wholly_right",
]


def path() -> str:
    """Folder of the bundled pipeline, for `DiffusionPipeline.from_pretrained(toy.path())`."""
    return str(Path(__file__).parent / "pipeline")


def load() -> DiffusionPipeline:
    """
    Load the bundled pipeline, with its image size of 64x64 pixels as the default.

    A pipeline does not store its default size, so one that is loaded from [`path`] needs `height=64` and `width=64` in
    each call.
    """
    from diffusers import DiffusionPipeline  # slow to import, and not needed for prompts and rewards

    pipe = DiffusionPipeline.from_pretrained(path())
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


def prompts(split: str, count: int | None = None, seed: int = 0) -> list[str]:
    """
    Captions of one split; the two splits do not overlap.

    Args:
        split (`str`): `"train"`, or `"test"` for captions on which neither the base model nor a policy is trained.
        count (`int`, *optional*): Number of captions. `None` returns all of them.
        seed (`int`, defaults to 0): Seed of the selection and the order.

    Raises:
        `ValueError`: If `split` is unknown or has fewer than `count` captions.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    texts = [text for text in all_captions() if is_held_out(text) == (split == "test")]
    count = len(texts) if count is None else count
    if not 0 < count <= len(texts):
        raise ValueError(f"`count` must be between 1 and {len(texts)} for the split {split!r}, got {count}.")
    return random.Random(seed).sample(texts, count)
