"""[`cache_prompt_embeds`]: a run's prompts encoded once, kept on disk, and text encoders that leave the device.

The files lie in the cache of datasets (`HF_DATASETS_CACHE`), in a folder named after the content of whatever made
them, so that a later run with the same text encoders reads them from there, and a larger one adds to them.
"""

import json
import math
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import safetensors.torch
import torch
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from peft.tuners.tuners_utils import BaseTunerLayer

from .prompt_sampler import PromptSampler


# Arrow has no bfloat16, so a prompt's tensors are the bytes of a safetensors file.
FEATURES = Features({"prompt": Value("string"), "tensors": Value("binary")})
ROWS_IN_MEMORY = 16  # before they are written; of FLUX about 4 MB each
# Of an encoder's configuration: where it comes from, and what the weights say themselves
NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class PromptEmbeds:
    """
    Encoded prompts on disk, by prompt. Each is read when it is asked for.

    Args:
        shards (`Iterable[datasets.Dataset]`): Rows of a `"prompt"` and its `"tensors"`.

    Example:

    ```py
    >>> embeds["a cat"]
    {'text_ids': tensor(...), ...}
    ```
    """

    def __init__(self, shards: Iterable[Dataset]):
        self._places = {prompt: (shard, i) for shard in shards for i, prompt in enumerate(shard["prompt"])}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._places

    def __getitem__(self, prompt: str) -> dict[str, torch.Tensor]:
        shard, i = self._places[prompt]
        return safetensors.torch.load(shard[i]["tensors"])


def cache_prompt_embeds(trainer: Any) -> None:
    """
    Encode the prompts that a trainer's run will need, unless they are on disk, and free the device of the encoders.

    Of several processes on a machine the first one encodes, and the others read what it wrote.

    Args:
        trainer ([`MixGRPOTrainer`]): Its policies take these prompts from the disk from now on.
    """
    policy, prompts = trainer.policy, prompts_of_run(trainer)
    folder = cache_folder(policy)
    with trainer.args.main_process_first(desc="encoding the prompts"):
        embeds = encode_prompts(policy, prompts, folder, trainer.args.device)
    policy.encoded = trainer.eval_policy.encoded = embeds


def encode_prompts(policy: Any, prompts: Iterable[str], folder: str, device: torch.device) -> PromptEmbeds:
    """
    The prompts in `folder`, and those of `prompts` that were not: these are encoded on `device` and added to it.

    Each prompt is encoded alone. What is kept depends on nothing but the prompt, then, while in a batch rounding
    could depend on the others.

    Args:
        policy ([`FluxPolicy`]): What encodes. Afterwards its text encoders are on the CPU.
        prompts (`Iterable[str]`): The prompts, also several times.
        folder (`str`): Of this policy's text encoders: [`cache_folder`].
        device (`torch.device`): Where to encode.
    """
    shards = [Dataset.from_file(str(file)) for file in sorted(Path(folder).glob("*.arrow"))]
    embeds = PromptEmbeds(shards)
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in embeds]
    if not new:
        policy.move_text_encoders("cpu")
        return embeds

    def encode(row: dict[str, Any]) -> dict[str, bytes]:
        tensors = vars(policy.encode([row["prompt"]], device))
        return {"tensors": safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})}

    os.makedirs(folder, exist_ok=True)
    shard_name = Hasher.hash_bytes(json.dumps(new).encode())
    with policy.text_encoders_on(device):
        shard = Dataset.from_dict({"prompt": new}).map(
            encode,
            cache_file_name=os.path.join(folder, f"{shard_name}.arrow"),
            features=FEATURES,
            new_fingerprint=shard_name,
            writer_batch_size=ROWS_IN_MEMORY,
            desc="Encoding prompts",
        )
    return PromptEmbeds([*shards, shard])


def prompts_of_run(trainer: Any) -> list[str]:
    """The prompts that a run from beginning to end will come to, on all devices, and those of its evaluations."""
    args, dataset, prompts = trainer.args, trainer.train_dataset, []
    if dataset is not None:
        at_once = args.prompts_per_iteration * trainer.accelerator.num_processes
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = PromptSampler(len(dataset), at_once, 1, args.shuffle_dataset, seed)
        per_epoch, steps = len(sampler) // at_once, args.optimizer_steps_per_iteration
        iterations = math.ceil(args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs * per_epoch)
        needed: dict[int, None] = {}
        for epoch in range(math.ceil(iterations / per_epoch)):
            sampler.set_epoch(epoch)
            needed |= dict.fromkeys(islice(sampler, (iterations - epoch * per_epoch) * at_once))
            if len(needed) == len(dataset):
                break
        prompts += [dataset[i]["prompt"] for i in needed]
    parts = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    return prompts + [part[i]["prompt"] for part in parts if part is not None for i in range(len(part))]


# ---- The content of what encodes ----


def cache_folder(policy: Any) -> str:
    """
    Where the embeddings of a policy's text encoders lie: a folder named after a hash of all that they depend on.

    That is the weights of the encoders with their dtypes, their configurations, adapters, tokenizers and the number of
    tokens. The device and the versions of libraries, which may round in other ways, are no part of it.

    Raises:
        `ValueError`: If the weights are not in memory, but offloaded.
    """
    content: list[Any] = [policy.max_sequence_length]
    for name, encoder in policy.text_encoders.items():
        config = {key: value for key, value in encoder.config.to_dict().items() if key not in NOT_CONTENT}
        content += [name, type(encoder).__name__, json.dumps(config, sort_keys=True, default=str)]
        for key, value in encoder.state_dict().items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(
                    f"`cache_prompt_embeds=True` has to read the weights of `{name}`, which are offloaded to disk or "
                    "layer by layer. Load the pipeline without that: these encoders leave the device anyway."
                )
            content += [key, _hash(value)]
        layers = (module for module in encoder.modules() if isinstance(module, BaseTunerLayer))
        content += [(layer.scaling, layer.active_adapters, layer.disable_adapters) for layer in layers]
    for name, tokenizer in policy.tokenizers.items():
        content += [name, type(tokenizer).__name__, tokenizer.model_max_length, _rules(tokenizer)]
    fingerprint = Hasher.hash_bytes(repr(content).encode())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "diffusers_mixgrpo", fingerprint)


def _hash(value: Any) -> str:
    """Of a tensor's content; a quantised one consists of others."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return repr((context, [_hash(getattr(value, name)) for name in names]))
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{value.dtype} {tuple(value.shape)} {Hasher.hash_bytes([content])}"


def _rules(tokenizer: Any) -> str:
    """What a tokenizer makes of a text, without the padding and truncation of its last call."""
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return json.dumps([rules, tokenizer.padding_side, tokenizer.special_tokens_map], default=str)
