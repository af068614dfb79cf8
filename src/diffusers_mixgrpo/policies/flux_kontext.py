"""
[`FluxKontextPolicy`]: FLUX.1-Kontext as a policy, which edits an image.

Shapes: `B` images, `L` image tokens (packed 2x2 latent patches), `L'` tokens of the image to edit, `C` channels of a
packed token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor, nn

from ..core.policy import Conditioning
from .base import require_images
from .flux import FluxPolicy, non_commercial


class FluxKontextPolicy(FluxPolicy):
    """
    A [`~diffusers.FluxKontextPipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    As [`FluxPolicy`], whose transformer sees the tokens of the image to edit behind those of the image. It has the
    size of the policy's images, while the pipeline's `__call__` would by default choose one of about a megapixel for
    both: see [`call_arguments`].
    """

    family = "flux-kontext"
    pipeline_class = FluxKontextPipeline
    licenses = {"black-forest-labs/FLUX.1-Kontext-dev": non_commercial("black-forest-labs/FLUX.1-Kontext-dev")}
    takes_image = True

    @property
    def call_arguments(self) -> dict[str, Any]:
        return super().call_arguments | {"max_area": self.height * self.width, "_auto_resize": False}

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        images = require_images(images)
        conditioning = super().encode(prompts, device=device)
        tokens = self._image_latents(images).to(conditioning.rows["prompt_embeds"])
        return Conditioning(conditioning.rows | {"image_latents": tokens}, conditioning.shared)

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        dtype = self.pipe.text_encoder_2.dtype
        latents, *_ = self.pipe.prepare_latents(None, *self._noise_arguments(generators, dtype))
        return latents

    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        tokens = torch.cat([latents, conditioning.rows["image_latents"].to(latents.dtype)], dim=1)
        return super().velocity(tokens, timestep, conditioning, transformer)[:, : latents.shape[1]]

    def _image_ids(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self._kept_image_ids is None:
            own, condition = (
                self.pipe._prepare_latent_image_ids(1, *patches, device, dtype)
                for patches in (self._patches, self._condition_patches)
            )
            condition[..., 0] = 1  # instead of 0
            self._kept_image_ids = torch.cat([own, condition])
        return self._kept_image_ids.to(device, dtype)
