"""Z-Image, with its ControlNets and its pipeline of many images."""

from functools import partial
from typing import Any

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from parts import SIZE, Case, case, embeds, image_vae, mask, picture


TEXT = {"prompt_embeds": [embeds(4, 16)], "guidance_scale": 0.0}
IMAGE = {"image": picture(), "strength": 0.9}
DIMENSIONS: dict[str, Any] = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def z_image(name: str, control_channels: int | None = None, **arguments: Any) -> Case:
    torch.manual_seed(0)
    options = DIMENSIONS | {"n_layers": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    if name == "ZImageOmniPipeline":
        options["siglip_feat_dim"] = 8
    transformer = ZImageTransformer2DModel(in_channels=4, **options)
    parts = {"transformer": transformer, "vae": image_vae()}
    if control_channels is not None:
        options = DIMENSIONS | {"control_layers_places": [0, 1], "control_refiner_layers_places": [0]}
        net = ZImageControlNetModel(control_in_dim=control_channels, **options)
        parts["controlnet"] = ZImageControlNetModel.from_transformer(net, transformer)
    with torch.no_grad():  # the class leaves these as they are in memory
        for name_, parameter in transformer.named_parameters():
            if name_.endswith("_pad_token"):
                parameter.fill_(1.0)
    return case(name, parts, **(TEXT | SIZE | arguments))


PIPELINES = {
    "ZImagePipeline": partial(z_image, "ZImagePipeline"),
    "ZImageImg2ImgPipeline": partial(z_image, "ZImageImg2ImgPipeline", **IMAGE),
    "ZImageInpaintPipeline": partial(z_image, "ZImageInpaintPipeline", mask_image=mask(), **IMAGE),
    "ZImageControlNetPipeline": partial(
        z_image, "ZImageControlNetPipeline", control_channels=4, control_image=picture()
    ),
    "ZImageControlNetInpaintPipeline": partial(
        z_image,
        "ZImageControlNetInpaintPipeline",
        control_channels=9,
        control_image=picture(),
        image=picture(),
        mask_image=mask(),
    ),
    "ZImageOmniPipeline": partial(z_image, "ZImageOmniPipeline", prompt_embeds=[[embeds(4, 16)]]),
}
