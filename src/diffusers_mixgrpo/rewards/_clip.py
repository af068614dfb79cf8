"""What the rewards built on CLIP share: batches, embeddings of prompts, and finding and reading weights."""

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


class BatchedReward:
    """
    Scores images in batches with a model that it owns. A subclass has a `__name__` and scores one batch in `_score`.

    An image that is `None` or cannot be decoded scores `None`; the others are converted to RGB first, which drops an
    alpha channel. A score depends on its own prompt and image alone, not on the others of its batch.

    Args:
        model (`torch.nn.Module`): Frozen here and put in evaluation mode.
        device (`str` or `torch.device`): Where to compute.
        batch_size (`int`): Most images at once.

    Raises:
        `ValueError`: If `batch_size` is less than 1.
    """

    __name__: str

    def __init__(self, model: nn.Module, device: str | torch.device, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model: Any = model.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.to(device)

    def to(self, device: str | torch.device) -> Self:
        """Move the model to `device`, compute there from now on, and return this reward."""
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
                Each image with its prompt; images of any mode and size.
            columns: Ignored.

        Returns:
            `list[float | None]` of length `n`.

        Raises:
            `ValueError`: If there is not one prompt per image.
        """
        if len(prompts) != len(images):
            raise ValueError(f"One prompt per image is needed, got {len(prompts)} prompts and {len(images)} images.")
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

    def _score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> torch.Tensor:
        """One float32 score for each of a batch's RGB images, of shape `(n,)`."""
        raise NotImplementedError


def to_rgb(image: Image.Image | None) -> Image.Image | None:
    """The image in RGB, or `None` if it cannot be decoded, as a truncated file."""
    try:
        return None if image is None else image.convert("RGB")
    except (OSError, SyntaxError):  # PIL raises both for broken files
        return None


def embed_prompts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """
    Text embeddings of a CLIP or SigLIP model, of shape `(n, dim)`, in float32. A prompt that comes twice is embedded
    once.

    Prompts are cut and padded to the model's context length. No attention mask is given: CLIP is causal and reads its
    embedding off the first end-of-text token, which what follows cannot reach, and SigLIP was trained without one.
    """
    unique = list(dict.fromkeys(prompts))
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(unique, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    features = model.get_text_features(tokens.input_ids.to(model.device)).pooler_output
    return features.float()[[unique.index(prompt) for prompt in prompts]]


@contextmanager
def loading(argument: str, value: str) -> Iterator[None]:
    """Turn the errors of loading what `argument` names into one that says so."""
    try:
        yield
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        raise OSError(
            f"`{argument}={value!r}` could not be loaded: {error}\nPass the id of a repository on the Hugging Face "
            "Hub, or the path of an existing local file or folder."
        ) from error


def read_weights(location: str, filename: str) -> dict[str, Any]:
    """
    A PyTorch or safetensors file: `location` itself, `filename` in that folder, or else in that Hub repository.

    PyTorch files are read with `weights_only=True`: they can run no code.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        path = path / filename
    elif not path.is_file():
        path = Path(hf_hub_download(location, filename))
    if path.suffix == ".safetensors":
        return load_file(path)
    # Files of PyTorch before 1.6 are not zip archives and cannot be mapped into memory
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
