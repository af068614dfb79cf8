"""Quantised parts of a pipeline: diffusers' configuration of them, from what JSON can say."""

import typing
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS_CONFIGS
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS_CONFIGS


KEYS = ("quant_backend", "quant_kwargs", "components_to_quantize")


def make_quantization(settings: dict[str, Any], pipeline_class: type[DiffusionPipeline]) -> PipelineQuantizationConfig:
    """
    Diffusers' configuration, to pass to `from_pretrained` as `quantization_config`.

    Diffusers takes the same settings for parts of its own and of transformers only where both libraries' classes have
    the same arguments, which torchao's have not. Here each part gets its own library's class.

    Args:
        settings (`dict`): As [`MixGRPOConfig.quantization`]: `"quant_backend"`, `"quant_kwargs"`, and
            `"components_to_quantize"`, the names of models in the pipeline.
        pipeline_class (`type`): The pipeline's class, whose `__init__` names its parts and their classes.

    Raises:
        `ValueError`: If a key, the backend or a component is unknown, or the backend does not take the arguments.
        `ImportError`: If the backend's package is missing.
    """
    if set(settings) - set(KEYS) or not settings.get("quant_backend") or not settings.get("components_to_quantize"):
        raise ValueError(
            "`quantization` must have 'quant_backend' and 'components_to_quantize', and may have 'quant_kwargs', got "
            f"{settings}."
        )
    backend, names = settings["quant_backend"], settings["components_to_quantize"]
    backends = sorted(DIFFUSERS_CONFIGS.keys() & TRANSFORMERS_CONFIGS.keys())
    if backend not in backends:
        raise ValueError(f"`quantization`: 'quant_backend' must be one of {', '.join(backends)}, got {backend!r}.")
    hints = typing.get_type_hints(pipeline_class.__init__)
    models = {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    names = [names] if isinstance(names, str) else names
    if unknown := [name for name in names if name not in models]:
        raise ValueError(
            f"`quantization`: 'components_to_quantize' must be among {', '.join(models)}, got {', '.join(unknown)}."
        )
    mapping = {}
    for name in names:
        config = (DIFFUSERS_CONFIGS if issubclass(models[name], ModelMixin) else TRANSFORMERS_CONFIGS)[backend]
        try:
            mapping[name] = config(**_as_objects(backend, settings.get("quant_kwargs") or {}))
        except ImportError as error:
            raise ImportError(
                f"`quantization` with {backend!r} needs a package that is missing ({error}). For bitsandbytes and "
                'torchao: pip install "diffusers-mixgrpo[quantization]".'
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"`quantization={settings}`: {error}.") from error
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _as_objects(backend: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with torchao's own configuration made from its name or its `config_to_dict`."""
    kind = kwargs.get("quant_type")
    if backend != "torchao" or not isinstance(kind, (str, dict)):
        return kwargs
    from torchao import quantization
    from torchao.core.config import config_from_dict

    return kwargs | {"quant_type": getattr(quantization, kind)() if isinstance(kind, str) else config_from_dict(kind)}
