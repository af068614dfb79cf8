"""[`FluxPolicy`]: FLUX as a policy. Prompts to conditioning, initial latents, one velocity, latents to images.

Everything is done as `FluxPipeline.__call__` does it, with the pipeline's own methods where it has one, so that a
rollout without noise is the stock pipeline's picture bit for bit.

Shapes: `B` images, `S` text tokens, `L` image tokens (packed 2x2 latent patches), `C` channels of a packed token.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Attention and feed-forward projections: the layers that diffusers' own FLUX LoRA training script adapts, and the
# feed-forward input of the single-stream blocks.
FLUX_LORA_TARGET_MODULES = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
]


@dataclass
class FluxConditioning:
    """
    Encoded prompts, one row per prompt.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(B, S, dim)`): T5 embeddings of the prompts.
        pooled_prompt_embeds (`torch.Tensor` of shape `(B, dim)`): Pooled CLIP embeddings.
        text_ids (`torch.Tensor` of shape `(S, 3)`): Positions of the text tokens, the same for all prompts.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    text_ids: torch.Tensor

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def __getitem__(self, index: "slice | Sequence[int] | torch.Tensor") -> "FluxConditioning":
        return FluxConditioning(self.prompt_embeds[index], self.pooled_prompt_embeds[index], self.text_ids)

    def repeat_interleave(self, repeats: int) -> "FluxConditioning":
        """Each row `repeats` times in a row: the conditioning of a group of images per prompt."""
        return FluxConditioning(
            self.prompt_embeds.repeat_interleave(repeats, dim=0),
            self.pooled_prompt_embeds.repeat_interleave(repeats, dim=0),
            self.text_ids,
        )

    def to(self, *args: Any, **kwargs: Any) -> "FluxConditioning":
        """As `torch.Tensor.to`, for each tensor."""
        return FluxConditioning(
            self.prompt_embeds.to(*args, **kwargs),
            self.pooled_prompt_embeds.to(*args, **kwargs),
            self.text_ids.to(*args, **kwargs),
        )


class FluxPolicy:
    """
    A [`~diffusers.FluxPipeline`] at one picture size, step count and guidance, as a policy to sample from and train.

    Args:
        pipe ([`~diffusers.FluxPipeline`]):
            The pipeline. Its `transformer` is the policy; its other parts are only used.
        height (`int`, *optional*):
            Height of the pictures in pixels, a multiple of twice the VAE's scale factor (16 for FLUX.1). Defaults to
            the pipeline's own default.
        width (`int`, *optional*):
            Width of the pictures in pixels, likewise.
        num_inference_steps (`int`, defaults to 25):
            Number of sampling steps `T`.
        guidance_scale (`float`, defaults to 3.5):
            Guidance given to a guidance-distilled transformer; without `guidance_embeds` it has no effect.
        max_sequence_length (`int`, defaults to 512):
            Number of T5 tokens that a prompt is padded or cut to.

    Attributes:
        encoded ([`PromptEmbeds`], *optional*):
            The tensors of prompts that are encoded already, where [`encode`] looks first. With it the text encoders
            are on the CPU, and come to the device for other prompts only.

    Raises:
        `TypeError`: If `pipe` is not a `FluxPipeline`.
        `ValueError`: If the pipeline's scheduler does not take a flow velocity as the prediction, or an argument is
            out of its range.
    """

    def __init__(
        self,
        pipe: FluxPipeline,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.5,
        max_sequence_length: int = 512,
    ):
        if not isinstance(pipe, FluxPipeline):
            raise TypeError(
                f"`pipe` must be a diffusers FluxPipeline, got {type(pipe).__name__}. Load it with "
                "`FluxPipeline.from_pretrained(...)`, or write a policy for this family next to policies/flux.py."
            )
        _require_flow_velocity(pipe.scheduler)
        self.pipe = pipe
        self.height = height if height is not None else pipe.default_sample_size * pipe.vae_scale_factor
        self.width = width if width is not None else pipe.default_sample_size * pipe.vae_scale_factor
        for name, size in (("height", self.height), ("width", self.width)):
            _require_packable(name, size, 2 * pipe.vae_scale_factor)
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be 1 or more, got {num_inference_steps}.")
        if not 1 <= max_sequence_length <= 512:
            raise ValueError(f"`max_sequence_length` must be from 1 to 512 (FLUX's limit), got {max_sequence_length}.")
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.max_sequence_length = max_sequence_length
        self.encoded: Any = None
        self._cached_image_ids: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.pipe.transformer.device

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Shape `(L, C)` of one image's packed latents."""
        patch = 2 * self.pipe.vae_scale_factor
        return (self.height // patch) * (self.width // patch), self.pipe.transformer.config.in_channels

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """What [`encode`] computes with, and nothing else does, by its name in the pipeline."""
        return {name: getattr(self.pipe, name) for name in ("text_encoder", "text_encoder_2")}

    @property
    def tokenizers(self) -> dict[str, Any]:
        return {name: getattr(self.pipe, name) for name in ("tokenizer", "tokenizer_2")}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], device: torch.device | None = None) -> FluxConditioning:
        """
        Encode `B` prompts with the pipeline's two text encoders, or take them from `encoded` if all are in it.

        Args:
            prompts (`Sequence[str]` of length `B`): The prompts.
            device (`torch.device`, *optional*): Where to encode them. Defaults to the transformer's device.
        """
        device = self.device if device is None else device
        if self.encoded is not None and all(prompt in self.encoded for prompt in prompts):
            rows = [self.encoded[prompt] for prompt in prompts]
            embeds, pooled = (torch.cat([r[name] for r in rows]) for name in ("prompt_embeds", "pooled_prompt_embeds"))
            return FluxConditioning(embeds, pooled, rows[0]["text_ids"]).to(device)
        with contextlib.nullcontext() if self.encoded is None else self.text_encoders_on(device):
            return FluxConditioning(
                *self.pipe.encode_prompt(
                    prompt=list(prompts),
                    prompt_2=None,
                    device=device,
                    max_sequence_length=self.max_sequence_length,
                )
            )

    @contextlib.contextmanager
    def text_encoders_on(self, device: torch.device) -> Iterator[None]:
        """Have the text encoders on `device`, and on the CPU afterwards."""
        self.move_text_encoders(device)
        try:
            yield
        finally:
            self.move_text_encoders("cpu")

    def move_text_encoders(self, device: torch.device | str) -> None:
        """Move the text encoders, but for those that accelerate's hooks move and those that cannot be moved."""
        for name, encoder in self.text_encoders.items():
            if hasattr(encoder, "_hf_hook"):
                continue
            try:
                encoder.to(device)
            except ValueError as error:  # transformers about some quantised models
                logger.warning_once(f"The pipeline's `{name}` stays on {encoder.device}: {error}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else the allocator keeps what they took

    def initial_latents(self, seeds: Sequence[int | torch.Generator]) -> torch.Tensor:
        """
        The noise that the pipeline would start from, given one generator per image.

        Args:
            seeds (`Sequence[int | torch.Generator]` of length `B`):
                A generator per image, or the seed of one on the CPU (the same noise on every device).

        Returns:
            `torch.Tensor` of shape `(B, L, C)` in the text encoders' dtype, as the pipeline's.
        """
        generators = [
            seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed) for seed in seeds
        ]
        latents, _ = self.pipe.prepare_latents(
            len(generators),
            self.pipe.transformer.config.in_channels // 4,
            self.height,
            self.width,
            self.pipe.text_encoder_2.dtype,
            self.device,
            generators,
        )
        return latents

    def prepare_scheduler(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        """Set `scheduler` to the times at which the pipeline would sample, and to the first of them."""
        steps = self.num_inference_steps
        sigmas = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        shift_mu = calculate_shift(
            self.latent_shape[0],
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )
        retrieve_timesteps(scheduler, steps, self.device, sigmas=sigmas, mu=shift_mu)
        scheduler.set_begin_index(0)

    def velocity(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: FluxConditioning,
        transformer: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """
        The transformer's prediction `v = noise - x_0`: one forward pass.

        Args:
            latents (`torch.Tensor` of shape `(B, L, C)`): The noisy latents. The transformer sees them in the dtype of
                the prompt embeddings, as in the pipeline, and the velocity comes back in the dtype of the latents: so
                a sampler may keep its states in float32 while the transformer computes in less.
            timestep (`torch.Tensor` of shape `()` or `(B,)`): `sigma * 1000`, one for all or one per image.
            conditioning ([`FluxConditioning`] of length `B`): The encoded prompts.
            transformer (`torch.nn.Module`, *optional*): What to call in place of `pipe.transformer`: the same module
                wrapped for distributed training, or another one with its signature.

        Returns:
            `torch.Tensor` of shape `(B, L, C)`.
        """
        hidden_states = latents.to(conditioning.prompt_embeds.dtype)
        batch_size = hidden_states.shape[0]
        own = self.pipe.transformer
        guidance = None
        if own.config.guidance_embeds:
            guidance = torch.full([1], self.guidance_scale, device=latents.device, dtype=torch.float32)
            guidance = guidance.expand(batch_size)
        model = own if transformer is None else transformer
        with own.cache_context("cond"):
            velocity = model(
                hidden_states=hidden_states,
                timestep=timestep.expand(batch_size).to(hidden_states.dtype) / 1000,
                guidance=guidance,
                pooled_projections=conditioning.pooled_prompt_embeds,
                encoder_hidden_states=conditioning.prompt_embeds,
                txt_ids=conditioning.text_ids,
                img_ids=self._image_ids(latents.device, hidden_states.dtype),
                joint_attention_kwargs={},
                return_dict=False,
            )[0]
        return velocity.to(latents.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int | None = None) -> list[Any]:
        """
        Decode packed latents into pictures.

        Args:
            latents (`torch.Tensor` of shape `(B, L, C)`): Denoised latents.
            batch_size (`int`, *optional*): How many to decode at once. Defaults to all.

        Returns:
            `list[PIL.Image.Image]` of length `B`.
        """
        pipe, images = self.pipe, []
        for chunk in latents.split(batch_size or max(1, len(latents))):
            chunk = pipe._unpack_latents(chunk, self.height, self.width, pipe.vae_scale_factor)
            chunk = (chunk / pipe.vae.config.scaling_factor) + pipe.vae.config.shift_factor
            decoded = pipe.vae.decode(chunk.to(pipe.vae.device, pipe.vae.dtype), return_dict=False)[0]
            images += pipe.image_processor.postprocess(decoded, output_type="pil")
        return images

    def _image_ids(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self._cached_image_ids is None:
            rows, columns = (size // (2 * self.pipe.vae_scale_factor) for size in (self.height, self.width))
            self._cached_image_ids = self.pipe._prepare_latent_image_ids(1, rows, columns, device, dtype)
        return self._cached_image_ids.to(device, dtype)


def load_flux_pipeline(name_or_path: str | os.PathLike, **kwargs: Any) -> FluxPipeline:
    """
    Load a pipeline from a folder or the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`): A folder written by `save_pretrained`, or a repository on the Hub.
        kwargs: Passed to `FluxPipeline.from_pretrained`.

    Raises:
        `FileNotFoundError`: If there is no such folder and it cannot be a repository either, or cannot be read.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    is_folder = os.path.isdir(name)
    if is_folder and not os.path.isfile(os.path.join(name, "model_index.json")):
        raise FileNotFoundError(
            f"`model`={name!r} is a folder without a model_index.json, so it holds no pipeline. Pass the folder that "
            "`pipe.save_pretrained(folder)` wrote."
        )
    if not is_folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"`model`={name!r}: there is no such folder, and it is not a Hub repository name (`owner/name`). Check "
            f"the path (the working directory is {os.getcwd()})."
        )
    try:
        return FluxPipeline.from_pretrained(name, **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"`model`={name!r} could not be loaded as a FluxPipeline: {error}. Check the name, that the network or "
            "the local cache has it, and that you have accepted its licence and are logged in (`hf auth login`)."
        ) from error


def _require_flow_velocity(scheduler: Any) -> None:
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return
    raise ValueError(
        f"`pipe.scheduler` is a {type(scheduler).__name__} (prediction_type="
        f"{scheduler.config.get('prediction_type')!r}), so the transformer's prediction may not be a flow velocity "
        "(noise - image), or its time shift is kept elsewhere. If the model does predict velocities, set "
        "`pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=..., use_dynamic_shifting=...)`."
    )


def _require_packable(name: str, size: int, patch: int) -> None:
    if size > 0 and size % patch == 0:
        return
    lower = max(patch, size // patch * patch)
    raise ValueError(
        f"`{name}` must be a positive multiple of {patch} pixels (VAE scale factor x 2, as latents are packed in "
        f"2x2 patches), got {size}. Use {lower} or {lower + patch}."
    )
