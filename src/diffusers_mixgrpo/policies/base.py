"""
[`PipelinePolicy`]: a diffusers pipeline as a policy to sample from and train. One subclass per pipeline family.

Everything is done as the pipeline's own `__call__` does it, with the pipeline's own methods where it has one, so that
a rollout without a window is the stock pipeline's image bit for bit.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.policy import Conditioning
from ..core.scheduler_configs import flow_matching_config


class PipelinePolicy(abc.ABC):
    """
    A pipeline at one image size, number of denoising steps and guidance scale.

    Shapes: `B` images, `...` the shape of one image's latents, [`latent_shape`].

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline. Its transformer is the policy; its other models are only
            used.
        height, width (`int`, *optional*): Size of the images in pixels. Default to the pipeline's own default.
        num_inference_steps (`int`, defaults to 25): Number of denoising steps `T`.
        guidance_scale (`float`, *optional*): Guidance scale, as in the pipeline's `__call__`, whose default it has.
        max_sequence_length (`int`, *optional*): Text tokens per prompt. Defaults to the pipeline's own default.
        negative_prompt (`str`, *optional*): What classifier-free guidance leads away from. Defaults to the family's.

    Raises:
        `TypeError`: If `pipe` is of another class.
        `ValueError`: If the pipeline's scheduler is not one of flow matching, one of its models is missing, or an
            argument is out of range.
    """

    family: ClassVar[str]
    """Name of the family, a tag in model cards."""
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """The diffusers pipeline that this family is made of."""
    lora_target_modules: ClassVar[Sequence[str]]
    """The transformer's layers that a LoRA adapts unless it says otherwise."""
    licenses: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Hub repositories of base models -> the entries of their cards that say which license they have."""
    longest_sequence: ClassVar[int]
    """The largest `max_sequence_length`."""
    default_sequence_length: ClassVar[int]
    """The `max_sequence_length` of the pipeline's `__call__`."""
    default_guidance_scale: ClassVar[float]
    """The guidance scale of the pipeline's `__call__`."""
    guidance_argument: ClassVar[str] = "guidance_scale"
    """The name of the guidance scale in the pipeline's `__call__`."""
    default_negative_prompt: ClassVar[str | None] = None
    """The negative prompt unless there is another one; `None` for pipelines that take none."""
    optional_parts: ClassVar[Sequence[str]] = ()
    """Models that the pipeline can do without."""
    takes_image: ClassVar[bool] = False
    """Whether the pipeline edits an image: the column `image` of a dataset then conditions the policy."""
    takes_batches: ClassVar[bool] = True
    """Whether the pipeline's `__call__` takes several prompts."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        if not isinstance(pipe, self.pipeline_class):
            raise TypeError(f"`pipe` must be a {self.pipeline_class.__name__}, got {type(pipe).__name__}.")
        require_all_parts(type(pipe), pipe.components, self.optional_parts)
        flow_matching_config(pipe.scheduler.config)
        self.pipe = pipe
        self.height = self.default_size if height is None else height
        self.width = self.default_size if width is None else width
        for name, size in (("height", self.height), ("width", self.width)):
            require_multiple(name, size, self.size_multiple)
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be 1 or more, got {num_inference_steps}.")
        max_sequence_length = self.default_sequence_length if max_sequence_length is None else max_sequence_length
        if not 1 <= max_sequence_length <= self.longest_sequence:
            raise ValueError(
                f"`max_sequence_length` must be in [1, {self.longest_sequence}], got {max_sequence_length}."
            )
        if negative_prompt is not None and self.default_negative_prompt is None:
            raise ValueError(
                f"`negative_prompt` must be None for a {type(pipe).__name__}, which takes none, got "
                f"{negative_prompt!r}."
            )
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        self.max_sequence_length = max_sequence_length
        self.negative_prompt = self.default_negative_prompt if negative_prompt is None else negative_prompt

    # ---- What a family defines ----

    @property
    @abc.abstractmethod
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    @abc.abstractmethod
    def encode(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image] | None = None,
        device: torch.device | None = None,
    ) -> Conditioning:
        """
        Encode `B` prompts with the pipeline's text encoders, and their images if it edits images.

        Args:
            prompts (`Sequence[str]` of length `B`): The prompts.
            images (`Sequence[PIL.Image.Image]` of length `B`, *optional*): The images to edit, as [`fit_image`] makes
                them. Only for families with `takes_image`.
            device (`torch.device`, *optional*): Where to encode. Defaults to the transformer's device.
        """

    @abc.abstractmethod
    def velocity(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        """
        The predicted velocity `noise - x_0`: see [`~core.policy.Policy.velocity`].

        The transformer sees the latents in the dtype of the prompt embeddings, as in the pipeline, and the velocity
        comes back in the dtype of the latents: a sampler may keep its states in float32 while the transformer computes
        in less. Predictions are combined for guidance in that dtype too.
        """

    @abc.abstractmethod
    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        """The pipeline's initial noise of one image per generator, of shape `(B, ...)`."""

    @abc.abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The VAE's output, of shape `(B, 3, height, width)` and in [-1, 1], from latents of shape `(B, ...)`."""

    @abc.abstractmethod
    def timestep_shift(self, scheduler: FlowMatchEulerDiscreteScheduler) -> float | None:
        """The `mu` that the pipeline passes to `scheduler.set_timesteps`, for schedulers with a dynamic shift."""

    # ---- What a family may define ----

    @property
    def default_size(self) -> int:
        """Height and width in pixels unless they are given."""
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    @property
    def condition_size(self) -> tuple[int, int]:
        """Width and height in pixels of the images to edit: those that the pipeline encodes."""
        return self.width, self.height

    @property
    def is_guided(self) -> bool:
        """Whether a velocity is combined of two forward passes: classifier-free guidance."""
        return False

    def sigmas(self, scheduler: FlowMatchEulerDiscreteScheduler) -> Sequence[float] | np.ndarray | None:
        """The `sigmas` that the pipeline passes to `scheduler.set_timesteps`. `None` if it passes their number."""
        steps = self.num_inference_steps
        return None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)

    # ---- What all families share ----

    @property
    def passes_per_step(self) -> int:
        """Forward passes of the transformer for one velocity of one image."""
        return 2 if self.is_guided else 1

    @property
    def device(self) -> torch.device:
        return self.pipe.transformer.device

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    @property
    def text_encoders(self) -> dict[str, PreTrainedModel]:
        """The models that [`encode`] uses and nothing else does, by their names in the pipeline."""
        return {name: part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part}

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        return {name: part for name, part in self.pipe.components.items() if name.startswith("tokenizer") and part}

    @property
    def call_arguments(self) -> dict[str, Any]:
        """The arguments with which the pipeline's `__call__` makes the policy's image of one prompt."""
        arguments: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            self.guidance_argument: self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
        }
        if self.is_guided and self.negative_prompt is not None:
            arguments["negative_prompt"] = self.negative_prompt
        return arguments

    def arguments_of(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> dict[str, Any]:
        """The arguments with which the pipeline's `__call__` makes the policy's images of several prompts."""
        arguments = self.call_arguments | {"prompt": list(prompts)}
        if images is not None:
            arguments["image"] = [self.fit_image(image) for image in images]
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
        return arguments

    def fit_image(self, image: Image.Image) -> Image.Image:
        """
        An image to edit at [`condition_size`], so that all of a run have the same number of tokens.

        It is cropped around its center where its aspect ratio is another one. One with the aspect ratio of
        `condition_size` is resized as diffusers does it.
        """
        return ImageOps.fit(image.convert("RGB"), self.condition_size, Image.Resampling.LANCZOS)

    def with_sampling(
        self, num_inference_steps: int | None = None, height: int | None = None, width: int | None = None
    ) -> "PipelinePolicy":
        """
        The same policy with another number of denoising steps or another image size; `None` keeps its own.

        A timestep shift that depends on the image size is that of the new size.

        Raises:
            `ValueError`: If the pipeline has no images of this size.
        """
        return type(self)(
            self.pipe,
            height=self.height if height is None else height,
            width=self.width if width is None else width,
            num_inference_steps=self.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=self.guidance_scale,
            max_sequence_length=self.max_sequence_length,
            negative_prompt=self.negative_prompt,
        )

    def initial_latents(self, seeds: Sequence[int | torch.Generator]) -> Tensor:
        """
        The noise that the pipeline starts from, given one generator per image.

        Args:
            seeds (`Sequence[int | torch.Generator]` of length `B`): A generator per image, or the seed of one on the
                CPU (which gives the same noise on every device).

        Returns:
            `torch.Tensor` of shape `(B, ...)`, in the dtype that the pipeline uses.
        """
        return self.prepare_latents(
            [seed if isinstance(seed, torch.Generator) else torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        )

    def prepare_scheduler(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        """Set `scheduler` to the timesteps at which the pipeline samples, and to the first of them."""
        sigmas = self.sigmas(scheduler)
        count = {"num_inference_steps": self.num_inference_steps} if sigmas is None else {"sigmas": sigmas}
        scheduler.set_timesteps(**count, device=self.device, mu=self.timestep_shift(scheduler))
        scheduler.set_begin_index(0)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int | None = None) -> list[Image.Image]:
        """
        Decode denoised latents.

        Args:
            latents (`torch.Tensor` of shape `(B, ...)`): Denoised latents.
            batch_size (`int`, *optional*): Images decoded at once. Defaults to all.

        Returns:
            `list[PIL.Image.Image]` of length `B`.
        """
        images: list[Image.Image] = []
        for part in latents.split(batch_size or max(1, len(latents))):
            images += self.pipe.image_processor.postprocess(self.decode_latents(part), output_type="pil")
        return images


class PackedPolicy(PipelinePolicy):
    """A pipeline whose latents are packed: a token of `C` channels for each 2x2 latent patch, of shape `(B, L, C)`."""

    @property
    def size_multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    @property
    def latent_shape(self) -> tuple[int, int]:
        rows, columns = self._patches
        return rows * columns, self.pipe.transformer.config.in_channels

    @property
    def _patches(self) -> tuple[int, int]:
        return self.height // self.size_multiple, self.width // self.size_multiple

    def _noise_arguments(self, generators: list[torch.Generator], dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments of the pipeline's `prepare_latents` for noise in `dtype`, but for an image to edit."""
        channels = self.pipe.transformer.config.in_channels // 4
        return len(generators), channels, self.height, self.width, dtype, self.device, generators

    @property
    def _condition_patches(self) -> tuple[int, int]:
        width, height = self.condition_size
        return height // self.size_multiple, width // self.size_multiple

    def _image_latents(self, images: Sequence[Image.Image]) -> Tensor:
        """
        Images to edit as packed tokens of shape `(B, L', C)`, where and in which dtype the VAE is.

        One by one, as the pipelines encode them: so they are the same numbers in each batch.
        """
        vae = self.pipe.vae
        pixels = self.pipe.image_processor.preprocess(list(images)).to(vae.device, vae.dtype)
        if vae.encoder.conv_in.weight.ndim == 5:  # a VAE of videos
            pixels = pixels.unsqueeze(2)
        latents = self.pipe._encode_vae_image(pixels, [None] * len(images))
        return self.pipe._pack_latents(latents, *latents.shape[:2], *latents.shape[-2:])


def require_all_parts(
    pipeline_class: type[DiffusionPipeline], parts: Mapping[str, Any], optional_parts: Sequence[str] = ()
) -> None:
    """
    Raise a `ValueError` if a part that is not optional is left out: `None`, or the `[None, None]` of a saved pipeline.
    """
    optional = [*pipeline_class._optional_components, *optional_parts]
    missing = [name for name, part in parts.items() if part in (None, [None, None]) and name not in optional]
    if missing:
        raise ValueError(
            f"`model` must be a pipeline with all of its parts, got None as its {', '.join(missing)}. Load it without "
            f"`{missing[0]}=None`, or set `pipe.{missing[0]}`. To take models off the device, use "
            "`cache_prompt_embeds=True` and `offload_vae=True`."
        )


def require_images(images: Sequence[Image.Image] | None) -> Sequence[Image.Image]:
    """The images to edit. Raise a `ValueError` if there are none."""
    if images is None:
        raise ValueError("`images` must be the images to edit, one per prompt, got None. Pass PIL images.")
    return images


def require_multiple(name: str, size: int, multiple: int) -> None:
    """Raise a `ValueError` unless the image size `size`, of the argument `name`, is a positive multiple."""
    if size > 0 and size % multiple == 0:
        return
    lower = max(multiple, size // multiple * multiple)
    raise ValueError(
        f"`{name}` must be a positive multiple of {multiple} pixels, got {size}. Use {lower} or {lower + multiple}."
    )
