"""A tiny FLUX for laptops: a whole `FluxPipeline` of 6 MB, its prompts, and a reward that can be verified.

```python
from diffusers_mixgrpo import toy

pipe = toy.load()
image = pipe("a small red circle at the top on gray").images[0]
toy.toy_reward(["a small red circle at the top on gray"], [image])
```

The pipeline was pretrained by `examples/build_toy_flux.py` on captions with wrong words in them, so it draws well and
listens badly. Every class in it is a stock one, in the layout of FLUX.1-dev.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from .reward import Judgement, extra_objects, judge, toy_reward, wholly_right
from .scenes import SIZE, Scene, all_captions, caption, draw, is_held_out, parse


if TYPE_CHECKING:
    from diffusers import FluxPipeline


__all__ = [
    "Judgement",
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
    """Folder of the bundled pipeline, for `FluxPipeline.from_pretrained(toy.path())`."""
    return str(Path(__file__).parent / "pipeline")


def load() -> "FluxPipeline":
    """
    The bundled pipeline, with its own picture size as the default.

    `FluxPipeline` does not store its default size: one that is loaded from [`path`] must be told `height=64` and
    `width=64`.
    """
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(path())
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe


def prompts(split: str, count: int | None = None, seed: int = 0) -> list[str]:
    """
    Captions of one side of the split; no caption is on both.

    Args:
        split (`str`): `"train"`, or `"test"` for those that neither the base model nor any policy is trained on.
        count (`int`, *optional*): how many; all of them if `None`.
        seed (`int`): of the choice and of the order.

    Raises:
        ValueError: if `split` is unknown or holds fewer than `count` captions.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    texts = [text for text in all_captions() if is_held_out(text) == (split == "test")]
    count = len(texts) if count is None else count
    if not 0 < count <= len(texts):
        raise ValueError(f"`count` must be between 1 and {len(texts)} for the split {split!r}, got {count}.")
    return random.Random(seed).sample(texts, count)
