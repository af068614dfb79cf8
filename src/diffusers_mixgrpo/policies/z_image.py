"""
[`ZImagePolicy`]: Z-Image as a policy.

Shapes: `B` images, `S` text tokens, `C` channels of a latent, `h` x `w` its size.
"""

from collections.abc import Sequence

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..core.policy import Conditioning
from .base import PipelinePolicy


class ZImagePolicy(PipelinePolicy):
    """
    A [`~diffusers.ZImagePipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    Its latents are of shape `(B, C, h, w)`, in float32. The transformer counts time from noise to image and predicts
    the negative velocity. It takes prompts of different lengths, which are kept padded, with their lengths. With a
    guidance scale above 0 both passes of classifier-free guidance are one pass of twice as many images.
    """

    family = "z-image"
    pipeline_class = ZImagePipeline
    licenses = {
        "Tongyi-MAI/Z-Image": {"license": "apache-2.0"},
        "Tongyi-MAI/Z-Image-Turbo": {"license": "apache-2.0"},
    }
    longest_sequence = 1024
    default_sequence_length = 512
    default_guidance_scale = 5.0
    default_negative_prompt = ""
    # The projections of attention and feed-forward layers
    lora_target_modules = (
        "attention.to_q",
        "attention.to_k",
        "attention.to_v",
        "attention.to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )

    @property
    def default_size(self) -> int:
        return 1024

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        factor = self.pipe.vae_scale_factor
        return self.pipe.transformer.in_channels, self.height // factor, self.width // factor

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 0

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        embeds, negative_embeds = self.pipe.encode_prompt(
            list(prompts),
            self.device if device is None else device,
            do_classifier_free_guidance=self.is_guided,
            negative_prompt=[self.negative_prompt] * len(prompts),
            max_sequence_length=self.max_sequence_length,
        )
        rows = self._padded("", embeds)
        if self.is_guided:
            rows |= self._padded("negative_", negative_embeds)
        return Conditioning(rows)

    def _padded(self, prefix: str, embeds: list[Tensor]) -> dict[str, Tensor]:
        """Embeddings of shape `(B, S, D)`, and their numbers of tokens, of shape `(B,)`."""
        longest = embeds[0].new_zeros(self.max_sequence_length, embeds[0].shape[-1])
        lengths = torch.tensor([len(each) for each in embeds], device=longest.device)
        padded = pad_sequence([*embeds, longest], batch_first=True)[:-1]
        return {f"{prefix}prompt_embeds": padded, f"{prefix}prompt_lengths": lengths}

    def _unpadded(self, prefix: str, conditioning: Conditioning) -> list[Tensor]:
        lengths = conditioning.rows[f"{prefix}prompt_lengths"].tolist()
        embeds = conditioning.rows[f"{prefix}prompt_embeds"]
        return [each[:length] for each, length in zip(embeds, lengths, strict=True)]

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        return self.pipe.prepare_latents(
            len(generators),
            self.pipe.transformer.in_channels,
            self.height,
            self.width,
            torch.float32,
            self.device,
            generators,
        )

    def sigmas(self, scheduler: FlowMatchEulerDiscreteScheduler) -> list[float]:
        return get_default_z_image_sigmas(self.num_inference_steps)

    def timestep_shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        _, rows, columns = self.latent_shape
        return calculate_shift(
            (rows // 2) * (columns // 2),
            scheduler.config.get("base_image_seq_len", 256),
            scheduler.config.get("max_image_seq_len", 4096),
            scheduler.config.get("base_shift", 0.5),
            scheduler.config.get("max_shift", 1.15),
        )

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        hidden_states = latents.to(conditioning.rows["prompt_embeds"].dtype)
        prompt_embeds = self._unpadded("", conditioning)
        time = (1000 - timestep.expand(len(latents))) / 1000
        if self.is_guided:
            hidden_states = torch.cat([hidden_states] * 2)
            prompt_embeds += self._unpadded("negative_", conditioning)
            time = torch.cat([time] * 2)
        outputs = (self.pipe.transformer if transformer is None else transformer)(
            list(hidden_states.unsqueeze(2).unbind()),
            time,
            prompt_embeds,
            joint_attention_kwargs=None,
            return_dict=False,
        )[0]
        prediction = torch.stack([output.float() for output in outputs]).squeeze(2)
        if self.is_guided:
            positive, negative = prediction.chunk(2)
            prediction = positive + self.guidance_scale * (positive - negative)
        return -prediction.to(latents.dtype)

    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.device, vae.dtype)
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
