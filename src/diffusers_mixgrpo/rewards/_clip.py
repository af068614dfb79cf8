"""Shared parts of the rewards built on CLIP: batching, prompt embeddings, and loading weights."""

import abc
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn


class BatchedReward(abc.ABC):
    """
    Base class of rewards that score images in batches with their own model. A subclass sets `__name__` and implements
    `_score` for one batch.

    An image that is `None` or cannot be decoded scores `None`. All other images are converted to RGB first, which
    drops an alpha channel. A score depends only on its own prompt and image, not on the rest of the batch.

    Args:
        model (`torch.nn.Module`): The scoring model. It is frozen and put in evaluation mode.
        device (`str` or `torch.device`): Device of the model.
        batch_size (`int`): Maximum number of images per forward pass.

    Raises:
        `ValueError`: If `batch_size` is less than 1.
    """

    __name__: str

    def __init__(self, model: nn.Module, device: str | torch.device, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}. Use 1 or more.")
        self.model: Any = model.eval().requires_grad_(False)  # each subclass knows its own architecture
        self.batch_size = batch_size
        self.to(device)

    def to(self, device: str | torch.device) -> Self:
        """Move the model to `device` and return this reward."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[str], images: Sequence[Image.Image | None], **columns: Any
    ) -> list[float | None]:
        """
        Args:
            prompts (`list[str]` of length `n`), images (`list[PIL.Image.Image]` of length `n`):
                One prompt per image. Images may have any mode and size.
            columns: Ignored.

        Returns:
            `list[float | None]` of length `n`.

        Raises:
            `ValueError`: If the numbers of prompts and images differ.
        """
        if len(prompts) != len(images):
            raise ValueError(
                f"`prompts` and `images` must have the same length, got {len(prompts)} prompts and {len(images)} "
                "images. Pass one prompt per image."
            )
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch_size):
            batch = [to_rgb(image) for image in images[start : start + self.batch_size]]
            readable = {row: image for row, image in enumerate(batch) if image is not None}
            scored: dict[int, float] = {}
            if readable:
                found = self._score([prompts[start + row] for row in readable], list(readable.values()))
                scored = dict(zip(readable, found.tolist(), strict=True))
            scores += [scored.get(row) for row in range(len(batch))]
        return scores

    @abc.abstractmethod
    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        """The float32 scores of one batch of RGB images, of shape `(n,)`."""


def to_rgb(image: Image.Image | None) -> Image.Image | None:
    """The image in RGB, or `None` if it cannot be decoded, for example because its file is truncated."""
    try:
        return None if image is None else image.convert("RGB")
    except (OSError, SyntaxError):  # PIL raises both for broken files
        return None


def embed_prompts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """
    Text embeddings of a CLIP or SigLIP model, of shape `(n, dim)`, in float32. Repeated prompts are embedded once.

    Prompts are truncated and padded to the model's context length. No attention mask is passed: CLIP is causal and
    takes its embedding from the first end-of-text token, which later tokens cannot influence, and SigLIP was trained
    without a mask.
    """
    unique = list(dict.fromkeys(prompts))
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    features = model.get_text_features(tokens.input_ids.to(model.device)).pooler_output
    return features.float()[[unique.index(prompt) for prompt in prompts]]


@contextmanager
def loading(argument: str, value: str) -> Iterator[None]:
    """Turn errors while loading the model or tokenizer that `argument` names into one error that names it."""
    try:
        yield
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise OSError(
            f"`{argument}`={value!r} could not be loaded: {error}\nPass the id of a repository on the Hugging Face "
            "Hub, or the path of an existing local file or folder."
        ) from error


def read_weights(location: str, filename: str) -> dict[str, Any]:
    """
    Read a PyTorch or safetensors file: `location` itself if it is a file, else `filename` in the local folder or Hub
    repository `location`.

    PyTorch files are read with `weights_only=True`, so they cannot run code.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        path = path / filename
    elif not path.is_file():
        path = Path(hf_hub_download(location, filename))
    if path.suffix == ".safetensors":
        return load_file(path)
    # Files of PyTorch before 1.6 are not zip archives and cannot be mapped into memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
