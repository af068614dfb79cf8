"""
[`FluxPolicy`]: FLUX.1 as a policy.

Shapes: `B` images, `S` text tokens, `L` image tokens (packed 2x2 latent patches), `C` channels of a packed token.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor, nn

from ..core.policy import Conditioning
from .base import PackedPolicy


def non_commercial(repository: str) -> dict[str, str]:
    """The license of the models for research, as their cards name it."""
    link = f"https://huggingface.co/{repository}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": "flux-1-dev-non-commercial-license", "license_link": link}


class FluxPolicy(PackedPolicy):
    """
    A [`~diffusers.FluxPipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    Its latents are packed, of shape `(B, L, C)`. The guidance scale is an input of a guidance-distilled transformer
    (FLUX.1-dev, FLUX.1-Krea-dev); without `guidance_embeds` (FLUX.1-schnell) it has no effect.
    """

    family = "flux"
    pipeline_class = FluxPipeline
    licenses = {
        "black-forest-labs/FLUX.1-dev": non_commercial("black-forest-labs/FLUX.1-dev"),
        "black-forest-labs/FLUX.1-Krea-dev": non_commercial("black-forest-labs/FLUX.1-Krea-dev"),
        "black-forest-labs/FLUX.1-schnell": {"license": "apache-2.0"},
    }
    longest_sequence = 512
    default_sequence_length = 512
    default_guidance_scale = 3.5
    # The attention and feed-forward projections that diffusers' own LoRA training script adapts, and the feed-forward
    # input of the single-stream blocks.
    lora_target_modules = (
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
    )

    _kept_image_ids: Tensor | None = None

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        prompt_embeds, pooled_prompt_embeds, text_ids = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            device=self.device if device is None else device,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(
            rows={"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds},
            shared={"text_ids": text_ids},
        )

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        latents, _ = self.pipe.prepare_latents(*self._noise_arguments(generators, self.pipe.text_encoder_2.dtype))
        return latents

    def timestep_shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        return calculate_shift(
            self.latent_shape[0],
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        own = self.pipe.transformer
        prompt_embeds = conditioning.rows["prompt_embeds"]
        hidden_states = latents.to(prompt_embeds.dtype)
        batch_size = len(hidden_states)
        guidance = None
        if own.config.guidance_embeds:
            guidance = torch.full([1], self.guidance_scale, device=latents.device, dtype=torch.float32)
            guidance = guidance.expand(batch_size)
        with own.cache_context("cond"):
            velocity = (own if transformer is None else transformer)(
                hidden_states=hidden_states,
                timestep=timestep.expand(batch_size).to(hidden_states.dtype) / 1000,
                guidance=guidance,
                pooled_projections=conditioning.rows["pooled_prompt_embeds"],
                encoder_hidden_states=prompt_embeds,
                txt_ids=conditioning.shared["text_ids"],
                img_ids=self._image_ids(latents.device, hidden_states.dtype),
                joint_attention_kwargs={},
                return_dict=False,
            )[0]
        return velocity.to(latents.dtype)

    def _image_ids(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Kept on the device, since copying them there in each pass would make the host wait.
        if self._kept_image_ids is None:
            self._kept_image_ids = self.pipe._prepare_latent_image_ids(1, *self._patches, device, dtype)
        return self._kept_image_ids.to(device, dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
