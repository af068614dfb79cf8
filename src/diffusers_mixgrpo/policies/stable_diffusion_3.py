"""
[`StableDiffusion3Policy`]: Stable Diffusion 3 and 3.5 as a policy.

Shapes: `B` images, `C` channels of a latent, `h` x `w` its size.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from PIL import Image
from torch import Tensor, nn

from ..core.policy import Conditioning
from .base import PipelinePolicy


class StableDiffusion3Policy(PipelinePolicy):
    """
    A [`~diffusers.StableDiffusion3Pipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    Its latents are of shape `(B, C, h, w)`. With a guidance scale above 1 both passes of classifier-free guidance are
    one pass of twice as many images.
    """

    family = "stable-diffusion-3"
    pipeline_class = StableDiffusion3Pipeline
    licenses = {
        f"stabilityai/stable-diffusion-3.5-{size}": {
            "license": "other",
            "license_name": "stabilityai-ai-community",
            "license_link": f"https://huggingface.co/stabilityai/stable-diffusion-3.5-{size}/blob/main/LICENSE.md",
        }
        for size in ("medium", "large", "large-turbo")
    }
    licenses["stabilityai/stable-diffusion-3-medium-diffusers"] = {
        "license": "other",
        "license_name": "stabilityai-nc-research-community",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3-medium-diffusers/blob/main/LICENSE",
    }
    longest_sequence = 512
    default_sequence_length = 256
    default_guidance_scale = 7.0
    default_negative_prompt = ""
    optional_parts = ("text_encoder_3", "tokenizer_3")  # the T5 encoder, 4.7 of the 5.6 billion encoder weights
    # The attention projections, as in diffusers' own LoRA training script
    lora_target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    @property
    def size_multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipe.vae_scale_factor
        return self.pipe.transformer.config.in_channels, self.height // factor, self.width // factor

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        embeds, negative_embeds, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            negative_prompt=self.negative_prompt,
            do_classifier_free_guidance=self.is_guided,
            device=self.device if device is None else device,
            max_sequence_length=self.max_sequence_length,
        )
        rows = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.is_guided:
            rows |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
        return Conditioning(rows)

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        return self.pipe.prepare_latents(
            len(generators),
            self.pipe.transformer.config.in_channels,
            self.height,
            self.width,
            self.pipe.text_encoder.dtype,
            self.device,
            generators,
        )

    def sigmas(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        return None

    def timestep_shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float | None:
        if not scheduler.config.use_dynamic_shifting:
            return None
        _, rows, columns = self.latent_shape
        patch_size = self.pipe.transformer.config.patch_size
        return calculate_shift(
            (rows // patch_size) * (columns // patch_size),
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.16),
        )

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        embeds = conditioning.rows["prompt_embeds"]
        pooled = conditioning.rows["pooled_prompt_embeds"]
        hidden_states = latents.to(embeds.dtype)
        timestep = timestep.expand(len(latents))
        if self.is_guided:
            embeds = torch.cat([conditioning.rows["negative_prompt_embeds"], embeds])
            pooled = torch.cat([conditioning.rows["negative_pooled_prompt_embeds"], pooled])
            hidden_states = torch.cat([hidden_states] * 2)
            timestep = torch.cat([timestep] * 2)
        velocity = (self.pipe.transformer if transformer is None else transformer)(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            joint_attention_kwargs=None,
            return_dict=False,
        )[0].to(latents.dtype)
        if self.is_guided:
            negative, positive = velocity.chunk(2)
            velocity = negative + self.guidance_scale * (positive - negative)
        return velocity

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
