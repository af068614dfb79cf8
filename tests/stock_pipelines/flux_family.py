"""FLUX.1, FLUX.2, Chroma and VisualCloze: for images, from text, images, masks and controls."""

from functools import partial
from typing import Any

import torch
from diffusers import ChromaTransformer2DModel, Flux2Transformer2DModel, FluxControlNetModel, FluxTransformer2DModel
from parts import SIZE, Case, case, embeds, flux_parts, image_vae, mask, picture
from policies.miniatures import build_flux2_klein


TEXT = {"prompt_embeds": embeds(1, 4, 32), "pooled_prompt_embeds": embeds(1, 32)}
IMAGE = {"image": picture(), "strength": 0.9}
INPAINT = IMAGE | {"mask_image": mask()}
CONTROL = {"control_image": picture()}
DIMENSIONS: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
}


def flux(name: str, in_channels: int = 16, control_net: bool = False, **arguments: Any) -> Case:
    """`in_channels` are the 16 of the packed latents, and those of what is joined to them."""
    torch.manual_seed(0)
    options = DIMENSIONS | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    transformer = FluxTransformer2DModel(in_channels=in_channels, out_channels=16, **options)
    parts = {"transformer": transformer, "vae": flux_parts()["vae"]}
    if control_net:
        net = FluxControlNetModel(in_channels=16, **options)
        torch.nn.init.normal_(net.controlnet_blocks[0].weight)  # which is zero at first
        parts["controlnet"] = net
    return case(name, parts, **(TEXT | SIZE | arguments))


def visual_cloze(name: str, **arguments: Any) -> Case:
    """Reads a grid of images and the two prompts itself."""
    torch.manual_seed(0)
    options = DIMENSIONS | {"pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
    transformer = FluxTransformer2DModel(in_channels=48, out_channels=16, **options)
    parts = flux_parts() | {"transformer": transformer, "resolution": 16}
    parts.pop("scheduler")
    images = [[picture(), picture()], [picture(), None]]
    prompts = {"task_prompt": "from a to b", "content_prompt": "a cat", "max_sequence_length": 8}
    return case(name, parts, image=images, **prompts, **arguments)


def chroma(name: str, **arguments: Any) -> Case:
    torch.manual_seed(0)
    options = {"approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16}
    transformer = ChromaTransformer2DModel(in_channels=16, axes_dims_rope=(4, 4, 8), **options, **DIMENSIONS)
    transformer.register_to_config(guidance_embeds=False)  # which ChromaInpaintPipeline reads
    text = {"prompt_embeds": embeds(1, 4, 32), "prompt_attention_mask": torch.ones(1, 4)}
    negative = {"negative_prompt_embeds": embeds(1, 4, 32, seed=2), "negative_prompt_attention_mask": torch.ones(1, 4)}
    return case(name, {"transformer": transformer, "vae": image_vae()}, **(text | negative | SIZE | arguments))


def flux2(name: str, **arguments: Any) -> Case:
    parts = build_flux2_klein().components
    parts.pop("scheduler")
    if name == "Flux2Pipeline":
        transformer = Flux2Transformer2DModel(**(dict(parts["transformer"].config) | {"guidance_embeds": True}))
        parts |= {"transformer": transformer, "text_encoder": None, "tokenizer": None}
    return case(name, parts, prompt_embeds=embeds(1, 4, 48), **(SIZE | arguments))


KONTEXT = {"_auto_resize": False, "max_area": 256}

PIPELINES = {
    "FluxPipeline": partial(flux, "FluxPipeline"),
    "FluxImg2ImgPipeline": partial(flux, "FluxImg2ImgPipeline", **IMAGE),
    "FluxInpaintPipeline": partial(flux, "FluxInpaintPipeline", **INPAINT),
    "FluxFillPipeline": partial(flux, "FluxFillPipeline", in_channels=48, **INPAINT),
    "FluxControlPipeline": partial(flux, "FluxControlPipeline", in_channels=32, **CONTROL),
    "FluxControlImg2ImgPipeline": partial(flux, "FluxControlImg2ImgPipeline", in_channels=32, **CONTROL, **IMAGE),
    "FluxControlInpaintPipeline": partial(flux, "FluxControlInpaintPipeline", in_channels=32, **CONTROL, **INPAINT),
    "FluxControlNetPipeline": partial(flux, "FluxControlNetPipeline", control_net=True, **CONTROL),
    "FluxControlNetImg2ImgPipeline": partial(
        flux, "FluxControlNetImg2ImgPipeline", control_net=True, **CONTROL, **IMAGE
    ),
    "FluxControlNetInpaintPipeline": partial(
        flux, "FluxControlNetInpaintPipeline", control_net=True, **CONTROL, **INPAINT
    ),
    "FluxKontextPipeline": partial(flux, "FluxKontextPipeline", image=picture(), **KONTEXT),
    "FluxKontextInpaintPipeline": partial(flux, "FluxKontextInpaintPipeline", **INPAINT, **KONTEXT),
    "Flux2Pipeline": partial(flux2, "Flux2Pipeline", image=picture(64)),
    "Flux2KleinPipeline": partial(flux2, "Flux2KleinPipeline", guidance_scale=1.0),
    "Flux2KleinInpaintPipeline": partial(flux2, "Flux2KleinInpaintPipeline", guidance_scale=1.0, **INPAINT),
    "Flux2KleinKVPipeline": partial(flux2, "Flux2KleinKVPipeline", image=picture(64)),
    "VisualClozeGenerationPipeline": partial(visual_cloze, "VisualClozeGenerationPipeline"),
    "VisualClozePipeline": partial(
        visual_cloze, "VisualClozePipeline", upsampling_height=16, upsampling_width=16, upsampling_strength=0.9
    ),
    "ChromaPipeline": partial(chroma, "ChromaPipeline"),
    "ChromaImg2ImgPipeline": partial(chroma, "ChromaImg2ImgPipeline", **IMAGE),
    "ChromaInpaintPipeline": partial(chroma, "ChromaInpaintPipeline", **INPAINT),
}
