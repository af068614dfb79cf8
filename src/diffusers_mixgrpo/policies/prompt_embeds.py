"""
Prompts that are encoded once and kept on disk, while the text encoders leave the device.

Where a pipeline edits images, a prompt stands for the prompt and its image here.

The files lie in the cache of datasets (`HF_DATASETS_CACHE`), in a folder named after the content of everything that
they depend on. A later run with the same text encoders reads them, and adds prompts that are new.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from diffusers.training_utils import free_memory
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.policy import Conditioning
from .base import PipelinePolicy


logger = logging.get_logger(__name__)

Prompt = str | tuple[str, Image.Image]
"""A prompt, or one with the image to edit, as [`PipelinePolicy.fit_image`] makes it."""

# Arrow has no bfloat16, so a prompt's tensors are the bytes of a safetensors file.
FEATURES = Features({"prompt": Value("string"), "tensors": Value("binary")})
ROWS_IN_MEMORY = 16  # before they are written; about 4 MB each for 512 tokens of 4096 numbers
FORMAT = 3  # of the files
# Entries of an encoder's configuration that say where it comes from, or what the weights say themselves
NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class CachedPrompts:
    """
    Encodes prompts as a policy does, from disk where they are there. The text encoders are on the CPU.

    Args:
        policy ([`PipelinePolicy`]): The policy. Its text encoders come to the device only for prompts not on disk.
        shards (`Iterable[datasets.Dataset]`): Rows of a `"prompt"`, as [`key_of`] writes it, and its `"tensors"`.
        device (`torch.device`): Where encoded prompts are returned, and others are encoded.

    Example:

    ```py
    >>> prompts = cache_prompts(policy, ["a cat", "a dog"], device)
    >>> conditioning = prompts.encode(["a dog"])
    ```
    """

    def __init__(self, policy: PipelinePolicy, shards: Iterable[Dataset], device: torch.device) -> None:
        self.policy = policy
        self.device = device
        self._places = {key: (shard, i) for shard in shards for i, key in enumerate(shard["prompt"])}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, prompt: Prompt) -> bool:
        return key_of(prompt) in self._places

    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Conditioning:
        """The conditioning of `B` prompts: [`PipelinePolicy.encode`]."""
        keys = [key_of(prompt) for prompt in (prompts if images is None else zip(prompts, images, strict=True))]
        if all(key in self._places for key in keys):
            return Conditioning.concatenate([self._read(key) for key in keys]).to(self.device)
        with text_encoders_on(self.policy, self.device):
            return self.policy.encode(prompts, images, self.device)

    def _read(self, key: str) -> Conditioning:
        shard, i = self._places[key]
        parts: dict[str, dict[str, torch.Tensor]] = {"rows": {}, "shared": {}}
        for key, tensor in safetensors.torch.load(shard[i]["tensors"]).items():
            part, name = key.split(".")
            parts[part][name] = tensor
        return Conditioning(**parts)


def cache_prompts(
    policy: PipelinePolicy, prompts: Sequence[Prompt], device: torch.device, folder: str | None = None
) -> CachedPrompts:
    """
    Encode prompts unless they are on disk, and move the text encoders to the CPU.

    Each prompt is encoded alone: the result then depends on nothing but the prompt, while in a batch rounding could
    depend on the other prompts.

    Args:
        policy ([`PipelinePolicy`]): The policy that encodes.
        prompts (`Sequence[str]` or `Sequence[tuple[str, PIL.Image.Image]]`): The prompts, or the prompts with their
            images; they may repeat. Those that are not on disk are read twice.
        device (`torch.device`): Where to encode.
        folder (`str`, *optional*): Where the files are. Defaults to the [`cache_folder`] of these text encoders.

    Returns:
        [`CachedPrompts`]: All prompts of the folder.
    """
    folder = cache_folder(policy) if folder is None else folder
    shards = [Dataset.from_file(str(file)) for file in sorted(Path(folder).glob("*.arrow"))]
    known = CachedPrompts(policy, shards, device)
    places: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        if prompt not in known:
            places.setdefault(key_of(prompt), i)
    new = list(places)
    if not new:
        move_text_encoders(policy, torch.device("cpu"))
        return known

    def encode(row: dict[str, str]) -> dict[str, bytes]:
        prompt = prompts[places[row["prompt"]]]
        text, images = (prompt, None) if isinstance(prompt, str) else (prompt[0], [prompt[1]])
        conditioning = policy.encode([text], images, device)
        tensors = {f"rows.{name}": tensor.contiguous() for name, tensor in conditioning.rows.items()}
        tensors |= {f"shared.{name}": tensor.contiguous() for name, tensor in conditioning.shared.items()}
        return {"tensors": safetensors.torch.save(tensors)}

    os.makedirs(folder, exist_ok=True)
    shard_name = Hasher.hash_bytes(json.dumps(new).encode())
    with text_encoders_on(policy, device):
        shard = Dataset.from_dict({"prompt": new}).map(
            encode,
            cache_file_name=os.path.join(folder, f"{shard_name}.arrow"),
            features=FEATURES,
            new_fingerprint=shard_name,
            writer_batch_size=ROWS_IN_MEMORY,
            desc="Encoding prompts",
        )
    return CachedPrompts(policy, [*shards, shard], device)


def key_of(prompt: Prompt) -> str:
    """A prompt by the name that it has on disk: its text, and before it a hash of the pixels of its image."""
    if isinstance(prompt, str):
        return prompt
    text, image = prompt
    return f"{Hasher.hash_bytes([image.mode.encode(), repr(image.size).encode(), image.tobytes()])} {text}"


# ---- Where the text encoders are ----


@contextlib.contextmanager
def text_encoders_on(policy: PipelinePolicy, device: torch.device) -> Iterator[None]:
    """A context with the text encoders on `device`. Afterwards they are on the CPU."""
    move_text_encoders(policy, device)
    try:
        yield
    finally:
        move_text_encoders(policy, torch.device("cpu"))


def move_text_encoders(policy: PipelinePolicy, device: torch.device) -> None:
    """Move the text encoders, except for those that accelerate's hooks move and those that cannot be moved."""
    for name, encoder in policy.text_encoders.items():
        if hasattr(encoder, "_hf_hook"):
            continue
        try:
            encoder.to(device)  # type: ignore[arg-type]  # it has the signature of a Module's
        except ValueError as error:  # transformers about some quantized models
            logger.warning_once(f"The pipeline's `{name}` stays on {encoder.device}: {error}")
    free_memory()


# ---- The content that the embeddings depend on ----


def cache_folder(policy: PipelinePolicy) -> str:
    """
    The folder of the embeddings of a policy's text encoders, named after a hash of everything that they depend on.

    This is the weights of the encoders with their dtypes, their configurations, adapters, tokenizers, the number of
    tokens, and the negative prompt; where images are edited, the VAE and the images' processor too. The device and the
    versions of libraries, which may round differently, are not included.

    Raises:
        `ValueError`: If the weights are offloaded and not in memory.
    """
    negative_prompt = policy.negative_prompt if policy.is_guided else None
    content: list[Any] = [FORMAT, type(policy).__name__, policy.max_sequence_length, policy.is_guided, negative_prompt]
    encoders = policy.text_encoders | ({"vae": policy.pipe.vae} if policy.takes_image else {})
    for name, encoder in encoders.items():
        config = {key: value for key, value in _config_of(encoder).items() if key not in NOT_CONTENT}
        content += [name, type(encoder).__name__, json.dumps(config, sort_keys=True, default=str)]
        for key, value in encoder.state_dict().items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(
                    f"`cache_prompt_embeds` must be False while the weights of `{name}` are offloaded to disk or "
                    "layer by layer, got True. Load the pipeline without this offloading: the text encoders leave the "
                    "device anyway."
                )
            content += [key, _hash(value)]
        layers = (module for module in encoder.modules() if isinstance(module, BaseTunerLayer))
        content += [(layer.scaling, layer.active_adapters, layer.disable_adapters) for layer in layers]
    for name, tokenizer in policy.tokenizers.items():
        content += [name, type(tokenizer).__name__, tokenizer.model_max_length, _rules(tokenizer)]
    if (processor := getattr(policy.pipe, "processor", None)) is not None:
        content += ["processor", _rules(processor.tokenizer), processor.image_processor.to_json_string()]
    fingerprint = Hasher.hash_bytes(repr(content).encode())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "diffusers_mixgrpo", fingerprint)


def _config_of(model: Any) -> dict[str, Any]:
    config = model.config  # one of transformers, or a dictionary of diffusers
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _hash(value: Any) -> str:
    """Hash of a tensor's content. A quantized tensor consists of other tensors."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return repr((context, [_hash(getattr(value, name)) for name in names]))
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{value.dtype} {tuple(value.shape)} {Hasher.hash_bytes([content])}"


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a tokenizer splits a text, without the padding and truncation of its last call."""
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None}
    return json.dumps([rules, tokenizer.padding_side, tokenizer.special_tokens_map], default=str)
