"""
Pipeline families as policies, one file per family on one base, and what makes a pipeline ready for training.

This table is the only list of families. A family's file is imported when one of its pipelines is used.
"""

import importlib

from .base import PipelinePolicy


# Class of the diffusers pipeline -> module and class of its policy
FAMILIES = {
    "FluxPipeline": ("flux", "FluxPolicy"),
    "FluxKontextPipeline": ("flux_kontext", "FluxKontextPolicy"),
    "Flux2Pipeline": ("flux2", "Flux2Policy"),
    "Flux2KleinPipeline": ("flux2", "Flux2KleinPolicy"),
    "QwenImageEditPipeline": ("qwen_image_edit", "QwenImageEditPolicy"),
    "QwenImageEditPlusPipeline": ("qwen_image_edit", "QwenImageEditPlusPolicy"),
    "QwenImagePipeline": ("qwen_image", "QwenImagePolicy"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "StableDiffusion3Policy"),
    "ZImagePipeline": ("z_image", "ZImagePolicy"),
}
# The pipeline of the papers, whose shift and guidance the presets have
PAPERS_PIPELINE = "FluxPipeline"


def policy_class(pipeline_class: str) -> type[PipelinePolicy]:
    """
    The policy of a pipeline family.

    Args:
        pipeline_class (`str`): Name of the diffusers pipeline class.

    Raises:
        `TypeError`: If the class is not supported.
    """
    if pipeline_class not in FAMILIES:
        raise TypeError(
            f"`model` must be one of the supported diffusers pipelines ({', '.join(FAMILIES)}), got "
            f"{pipeline_class}. To support another family, add a policy for it in policies/."
        )
    module, name = FAMILIES[pipeline_class]
    return getattr(importlib.import_module(f".{module}", __name__), name)


__all__ = ["FAMILIES", "PipelinePolicy", "policy_class"]
