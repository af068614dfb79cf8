"""
[`QwenImagePolicy`]: Qwen-Image as a policy.

Shapes: `B` images, `S` text tokens, `L` image tokens (packed 2x2 latent patches), `C` channels of a packed token.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core.policy import Conditioning
from .base import PackedPolicy


class QwenImagePolicy(PackedPolicy):
    """
    A [`~diffusers.QwenImagePipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    Its latents are packed, of shape `(B, L, C)`. The pipeline pads prompts to the longest of a call; here all are
    padded to `max_sequence_length`, and masked, so that a prompt is the same numbers in each batch. With a guidance
    scale above 1 the guided velocity gets the norm of the conditional one, token by token.
    """

    family = "qwen-image"
    pipeline_class = QwenImagePipeline
    licenses = {"Qwen/Qwen-Image": {"license": "apache-2.0"}, "Qwen/Qwen-Image-2512": {"license": "apache-2.0"}}
    longest_sequence = 1024
    default_sequence_length = 512
    default_guidance_scale = 4.0
    guidance_argument = "true_cfg_scale"
    default_negative_prompt = " "  # as in the model's card
    # The projections of both streams' attention and feed-forward layers
    lora_target_modules = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

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
        device = self.device if device is None else device
        embeds, mask = self._embed(prompts, images, device)
        if mask is None:  # all are of one length
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = self._sequence_length - embeds.shape[1]
        rows = {"prompt_embeds": pad(embeds, (0, 0, 0, missing)), "prompt_mask": pad(mask, (0, missing))}
        if self.is_guided:
            negative = [self.negative_prompt or ""] * len(prompts)
            rows["negative_prompt_embeds"], _ = self._embed(negative, images, device)
        return Conditioning(rows)

    @property
    def _sequence_length(self) -> int:
        """Tokens that each prompt is padded to."""
        return self.max_sequence_length

    def _embed(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of shape `(B, S, D)`, padded to the longest prompt, and their mask if they differ in length."""
        return self.pipe.encode_prompt(list(prompts), device, max_sequence_length=self.max_sequence_length)

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        return self.pipe.prepare_latents(*self._noise_arguments(generators, self.pipe.text_encoder.dtype))

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
        hidden_states = self._tokens(latents, conditioning)
        batch_size = len(hidden_states)

        def predict(prompt_embeds: Tensor, mask: Tensor | None, cache: str) -> Tensor:
            with own.cache_context(cache):
                return (own if transformer is None else transformer)(
                    hidden_states=hidden_states,
                    timestep=timestep.expand(batch_size).to(hidden_states.dtype) / 1000,
                    guidance=None,
                    encoder_hidden_states_mask=mask,
                    encoder_hidden_states=prompt_embeds,
                    img_shapes=[self._image_shapes] * batch_size,
                    attention_kwargs={},
                    return_dict=False,
                )[0][:, : latents.shape[1]].to(latents.dtype)

        rows = conditioning.rows
        velocity = predict(rows["prompt_embeds"], rows["prompt_mask"], "cond")
        if self.is_guided:
            negative = predict(rows["negative_prompt_embeds"], None, "uncond")  # one text in all rows: not padded
            guided = negative + self.guidance_scale * (velocity - negative)
            norm, guided_norm = (torch.norm(value, dim=-1, keepdim=True) for value in (velocity, guided))
            velocity = guided * (norm / guided_norm)
        return velocity

    @property
    def _image_shapes(self) -> list[tuple[int, int, int]]:
        """Frames, rows and columns of the image tokens."""
        return [(1, *self._patches)]

    def _tokens(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """The image tokens that the transformer sees; it predicts the velocity of the first ones."""
        return latents.to(conditioning.rows["prompt_embeds"].dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = self.pipe._unpack_latents(latents, self.height, self.width, self.pipe.vae_scale_factor)
        latents = latents.to(vae.device, vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
        return vae.decode(latents / inverse_std + mean, return_dict=False)[0][:, :, 0]
