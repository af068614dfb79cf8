"""
[`QwenImageEditPolicy`] and [`QwenImageEditPlusPolicy`]: Qwen-Image-Edit as a policy, which edits an image.

Shapes: `B` images, `S` tokens of text and of the image that the language model sees, `L` image tokens (packed 2x2
latent patches), `L'` tokens of the image to edit, `C` channels of a packed token.
"""

import functools
from collections.abc import Sequence

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor

from ..core.policy import Conditioning
from .base import require_images
from .qwen_image import QwenImagePolicy


class QwenImageEditPolicy(QwenImagePolicy):
    """
    A [`~diffusers.QwenImageEditPipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    As [`QwenImagePolicy`]. The image to edit is seen twice: by the language model, together with the prompt, and by
    the transformer, whose tokens of it come behind those of the image. As in the pipeline it has about a megapixel,
    with the aspect ratio of the policy's images and whatever their size. `max_sequence_length` are the tokens of the
    text, to which those of the image are added; the pipeline does not cut longer texts, the policy does.
    """

    family = "qwen-image-edit"
    pipeline_class = QwenImageEditPipeline
    licenses = {"Qwen/Qwen-Image-Edit": {"license": "apache-2.0"}}
    takes_image = True

    @functools.cached_property
    def condition_size(self) -> tuple[int, int]:
        # The pipeline resizes an image of this size to this size: rounding may take a second turn.
        before = None
        size = (self.width, self.height)
        while size != before:
            before = size
            size = calculate_dimensions(1024 * 1024, size[0] / size[1])[:2]
        return size

    @property
    def _language_size(self) -> tuple[int, int]:
        """Width and height of the image that the language model sees, in pixels."""
        return self.condition_size

    @functools.cached_property
    def _sequence_length(self) -> int:
        processor = self.pipe.processor.image_processor
        width, height = self._language_size
        patches = processor.get_number_of_image_patches(height, width, {})
        return self.max_sequence_length + patches // processor.merge_size**2

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        images = require_images(images)
        conditioning = super().encode(prompts, images, device)
        tokens = self._image_latents(images).to(conditioning.rows["prompt_embeds"])
        return Conditioning(conditioning.rows | {"image_latents": tokens})

    def _embed(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        return self.pipe.encode_prompt(list(prompts), list(images or ()), device)

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        latents, _ = self.pipe.prepare_latents(None, *self._noise_arguments(generators, self.pipe.text_encoder.dtype))
        return latents

    @property
    def _image_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, *self._patches), (1, *self._condition_patches)]

    def _tokens(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.cat([super()._tokens(latents, conditioning), conditioning.rows["image_latents"]], dim=1)


class QwenImageEditPlusPolicy(QwenImageEditPolicy):
    """
    A [`~diffusers.QwenImageEditPlusPipeline`] as a policy, with the arguments of [`PipelinePolicy`].

    As [`QwenImageEditPolicy`], with one image to edit. The language model sees it in a smaller size, made from the one
    that the transformer sees. The pipeline samples one prompt at a time; the policy samples and trains batches.
    """

    pipeline_class = QwenImageEditPlusPipeline
    licenses = {
        "Qwen/Qwen-Image-Edit-2509": {"license": "apache-2.0"},
        "Qwen/Qwen-Image-Edit-2511": {"license": "apache-2.0"},
    }
    takes_batches = False

    @functools.cached_property
    def _language_size(self) -> tuple[int, int]:
        width, height = self.condition_size
        return calculate_dimensions(pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, width / height)[:2]

    def _embed(
        self, prompts: Sequence[str], images: Sequence[Image.Image] | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        width, height = self._language_size
        seen = [self.pipe.image_processor.resize(image, height, width) for image in images or ()]
        # Several images in a call would be those of one prompt.
        embeds = [
            self.pipe.encode_prompt([prompt], [image], device)[0][0]
            for prompt, image in zip(prompts, seen, strict=True)
        ]
        mask = [torch.ones(len(each), dtype=torch.long, device=each.device) for each in embeds]
        padded, masks = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (embeds, mask))
        return padded, masks
