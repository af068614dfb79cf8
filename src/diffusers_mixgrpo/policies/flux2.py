"""
[`Flux2Policy`] and [`Flux2KleinPolicy`]: FLUX.2 as a policy.

Shapes: `B` images, `S` text tokens, `L` image tokens (packed 2x2 latent patches), `C` channels of a packed token.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..core.policy import Conditioning
from .base import PackedPolicy


class Flux2Policy(PackedPolicy):
    """
    A [`~diffusers.Flux2Pipeline`], FLUX.2-dev, as a policy, with the arguments of [`PipelinePolicy`].

    Its latents are packed, of shape `(B, L, C)`. The guidance scale is an input of the transformer. The timestep shift
    depends on the image size and on the number of denoising steps. `max_sequence_length` includes the tokens of the
    pipeline's system message, and what is left is padded.
    """

    family = "flux2"
    pipeline_class = Flux2Pipeline
    licenses = {
        **{
            f"black-forest-labs/FLUX.2-{name}": {
                "license": "other",
                "license_name": "flux-non-commercial-license",
                "license_link": f"https://huggingface.co/black-forest-labs/FLUX.2-{name}/blob/main/LICENSE.md",
            }
            for name in ("dev", "klein-9B", "klein-base-9B")
        },
        "black-forest-labs/FLUX.2-klein-4B": {"license": "apache-2.0"},
        "black-forest-labs/FLUX.2-klein-base-4B": {"license": "apache-2.0"},
    }
    longest_sequence = 512
    default_sequence_length = 512
    default_guidance_scale = 4.0
    # The attention projections of the double-stream blocks, and the input of the single-stream ones, where attention
    # and feed-forward layer are one. (`attn.to_out` would also match a list of the double-stream blocks.)
    lora_target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_qkv_mlp_proj",
    )

    _kept_latent_ids: Tensor | None = None

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        # FLUX.2-dev has a processor, of images too, around it.
        return {name: getattr(part, "tokenizer", part) for name, part in super().tokenizers.items()}

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        embeds, text_ids = self._encode(list(prompts), self.device if device is None else device)
        return Conditioning({"prompt_embeds": embeds}, {"text_ids": text_ids})

    def _encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings of shape `(B, S, D)`, and the positions of their tokens, of shape `(1, S, 4)`."""
        embeds, text_ids = self.pipe.encode_prompt(prompts, device, max_sequence_length=self.max_sequence_length)
        return embeds, text_ids[:1]

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        latents, _ = self.pipe.prepare_latents(*self._noise_arguments(generators, self.pipe.text_encoder.dtype))
        return latents

    def timestep_shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        return compute_empirical_mu(self.latent_shape[0], self.num_inference_steps)

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        guidance = torch.full([1], self.guidance_scale, device=latents.device, dtype=torch.float32)
        prompt_embeds = conditioning.rows["prompt_embeds"]
        return self._predict(
            latents, timestep, prompt_embeds, conditioning, guidance.expand(len(latents)), "cond", transformer
        )

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        conditioning: Conditioning,
        guidance: Tensor | None,
        cache: str,
        transformer: nn.Module | None,
    ) -> Tensor:
        own = self.pipe.transformer
        hidden_states = latents.to(prompt_embeds.dtype)
        with own.cache_context(cache):
            return (own if transformer is None else transformer)(
                hidden_states=hidden_states,
                timestep=timestep.expand(len(latents)).to(hidden_states.dtype) / 1000,
                guidance=guidance,
                encoder_hidden_states=prompt_embeds,
                txt_ids=conditioning.shared["text_ids"],
                img_ids=self._latent_ids(latents.device),
                joint_attention_kwargs=None,
                return_dict=False,
            )[0].to(latents.dtype)

    def _latent_ids(self, device: torch.device) -> Tensor:
        """The positions of the image tokens, of shape `(1, L, 4)`."""
        # Kept on the device, since copying them there in each pass would make the host wait.
        if self._kept_latent_ids is None:
            self._kept_latent_ids = self.pipe._prepare_latent_ids(torch.empty(1, 1, *self._patches, device="meta"))
        self._kept_latent_ids = self._kept_latent_ids.to(device)
        return self._kept_latent_ids

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents.transpose(1, 2).unflatten(2, self._patches)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(latents)
        latents = self.pipe._unpatchify_latents(latents * std + mean)
        return vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]


class Flux2KleinPolicy(Flux2Policy):
    """
    A [`~diffusers.Flux2KleinPipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    As [`Flux2Policy`], but with classifier-free guidance in two passes, which the distilled models do without. Its
    negative prompt is empty.
    """

    pipeline_class = Flux2KleinPipeline

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1 and not self.pipe.config.is_distilled

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        conditioning = super().encode(prompts, device=device)
        if not self.is_guided:
            return conditioning
        negative, _ = self._encode([""] * len(prompts), self.device if device is None else device)
        return Conditioning(conditioning.rows | {"negative_prompt_embeds": negative}, conditioning.shared)

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        prompt_embeds = conditioning.rows["prompt_embeds"]
        velocity = self._predict(latents, timestep, prompt_embeds, conditioning, None, "cond", transformer)
        if self.is_guided:
            prompt_embeds = conditioning.rows["negative_prompt_embeds"]
            negative = self._predict(latents, timestep, prompt_embeds, conditioning, None, "uncond", transformer)
            velocity = negative + self.guidance_scale * (velocity - negative)
        return velocity
