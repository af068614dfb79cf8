"""What the sampler and the trainer need to know about one family of pipelines, one file per family."""

from .flux import FLUX_LORA_TARGET_MODULES, FluxConditioning, FluxPolicy, load_flux_pipeline


__all__ = ["FLUX_LORA_TARGET_MODULES", "FluxConditioning", "FluxPolicy", "load_flux_pipeline"]
