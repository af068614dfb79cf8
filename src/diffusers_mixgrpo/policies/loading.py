"""Loading a pipeline of a supported family: its class, its precision, quantized parts."""

import contextlib
import inspect
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as DIFFUSERS_CONFIGS
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as TRANSFORMERS_CONFIGS
from transformers.utils.logging import set_tqdm_hook

from ..core.scheduler_configs import flow_matching_config
from ..mixgrpo_config import MixGRPOConfig
from . import FAMILIES, policy_class
from .base import PipelinePolicy, require_all_parts
from .lora_targets import check_targets


# Arguments of `from_pretrained` that also say where the pipeline's configuration is
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

NO_FULL_FINE_TUNING = (
    "quantized weights cannot be trained themselves, since they hold too few bits for a small step. Train a LoRA on "
    "them with `peft_config`, or load the transformer without quantization."
)


def check_source(
    model: DiffusionPipeline | str | os.PathLike, settings: MixGRPOConfig, peft_config: PeftConfig | None = None
) -> type[PipelinePolicy]:
    """
    Check that a pipeline can be trained, from its small files alone if it is not loaded yet.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str` or `os.PathLike`): As in [`load_pipeline`].
        settings ([`MixGRPOConfig`]): The configuration.
        peft_config ([`~peft.LoraConfig`], *optional*): The LoRA that its transformer will get.

    Returns:
        `type`: The policy of the pipeline's family.

    Raises:
        `FileNotFoundError`: If there is no such folder or repository, or it cannot be read.
        `TypeError`: If the pipeline's family is not supported, or its transformer is one of another family.
        `ValueError`: If one of its models is left out, its scheduler is not one of flow matching, or the LoRA names
            layers that the transformer does not have.
    """
    if not isinstance(model, (str, os.PathLike)):
        policy = _check_loaded(model)
        _check_lora(model.transformer, peft_config, policy.lora_target_modules)
        return policy
    name = os.path.expanduser(os.fspath(model))
    init_kwargs, hub_kwargs = _init_kwargs(settings)
    config = _pipeline_config(name, hub_kwargs)
    policy = policy_class(_class_name(config))
    pipeline_class = policy.pipeline_class
    expected = inspect.signature(pipeline_class.__init__).parameters
    parts = {part: value for part, value in (config | init_kwargs).items() if part in expected}
    require_all_parts(pipeline_class, parts, policy.optional_parts)
    if "scheduler" not in init_kwargs:
        try:
            scheduler = FlowMatchEulerDiscreteScheduler.load_config(name, subfolder="scheduler", **hub_kwargs)
        except OSError as error:
            raise _not_loaded(name, error) from error
        flow_matching_config(scheduler)
    if peft_config is not None:
        transformer = init_kwargs.get("transformer") or _skeleton(name, pipeline_class, hub_kwargs)
        _check_lora(transformer, peft_config, policy.lora_target_modules)
    return policy


def _check_lora(transformer: nn.Module, peft_config: PeftConfig | None, own_targets: Sequence[str]) -> None:
    if isinstance(peft_config, LoraConfig) and not hasattr(transformer, "peft_config"):
        check_targets(getattr(transformer, "_orig_mod", transformer), peft_config, own_targets)


def _skeleton(name: str, pipeline_class: type[DiffusionPipeline], hub_kwargs: dict[str, Any]) -> nn.Module:
    """A pipeline's transformer without its weights, from its configuration alone."""
    kind = pipeline_class._get_signature_types()["transformer"][0]
    try:
        config = kind.load_config(name, subfolder="transformer", **hub_kwargs)
    except OSError as error:
        raise _not_loaded(name, error) from error
    with torch.device("meta"):
        return kind.from_config({key: value for key, value in config.items() if key != "quantization_config"})


def _check_loaded(pipe: DiffusionPipeline) -> type[PipelinePolicy]:
    # `FluxPipeline.from_pretrained` gives a FluxPipeline of any family's parts, with a line in the log.
    policy = policy_class(type(pipe).__name__)
    kinds = policy.pipeline_class._get_signature_types()["transformer"]
    transformer = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    if transformer is not None and not isinstance(transformer, kinds):
        raise TypeError(
            f"`model` must have a transformer of its own family, {kinds[0].__name__}, got a {type(pipe).__name__} "
            f"with a {type(transformer).__name__}. It was loaded from weights of another family: load them with "
            "`DiffusionPipeline.from_pretrained`, which picks the right class, if one of the supported "
            f"({', '.join(FAMILIES)})."
        )
    require_all_parts(type(pipe), pipe.components, policy.optional_parts)
    flow_matching_config(pipe.scheduler.config)
    return policy


def load_pipeline(
    model: DiffusionPipeline | str | os.PathLike, settings: MixGRPOConfig, with_lora: bool
) -> DiffusionPipeline:
    """
    Load a pipeline, unless it is loaded already.

    Frozen models are loaded in the precision of the computation, weights that will be trained in float32.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str` or `os.PathLike`): The pipeline, or its folder or Hub
            repository.
        settings ([`MixGRPOConfig`]): The configuration.
        with_lora (`bool`): Whether a LoRA will be added. Without it the whole transformer is trained.

    Raises:
        `FileNotFoundError`: If there is no such folder or repository, or it cannot be read.
        `TypeError`: If the pipeline's family is not supported.
        `ValueError`: If `quantization` is not possible, as for a pipeline that is loaded already.
    """
    if isinstance(model, (str, os.PathLike)):
        return _load(os.path.expanduser(os.fspath(model)), settings, with_lora)
    if settings.quantization is not None:
        raise ValueError(
            f"`quantization` must be None for a pipeline that is loaded already, got {settings.quantization}. Pass "
            "the name or folder of the pipeline as `model`, or load it quantized and leave out `quantization`."
        )
    return model


def _load(name: str, settings: MixGRPOConfig, with_lora: bool) -> DiffusionPipeline:
    init_kwargs, hub_kwargs = _init_kwargs(settings)
    pipeline_class = policy_class(_class_name(_pipeline_config(name, hub_kwargs))).pipeline_class
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32
    kwargs: dict[str, Any] = {"dtype": half if with_lora else {"transformer": torch.float32, "default": half}}
    kwargs |= init_kwargs
    if "torch_dtype" in kwargs:  # the older name
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    if isinstance(kwargs["dtype"], str):
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if isinstance(settings.quantization, dict):
        if not with_lora and "transformer" in settings.quantization.get("components_to_quantize", ()):
            raise ValueError(f"`quantization={settings.quantization}`: {NO_FULL_FINE_TUNING}")
        kwargs["quantization_config"] = make_quantization(settings.quantization, pipeline_class)
    try:
        with one_progress_bar():
            return pipeline_class.from_pretrained(name, **kwargs)
    except OSError as error:
        raise _not_loaded(name, error) from error


@contextlib.contextmanager
def one_progress_bar() -> Iterator[None]:
    """Inside, a pipeline that is loaded shows its own progress bar, and none of each text encoder within it."""
    previous_hook = set_tqdm_hook(lambda tqdm, args, kwargs: tqdm(*args, **(kwargs | {"disable": True})))
    try:
        yield
    finally:
        set_tqdm_hook(previous_hook)


def _init_kwargs(settings: MixGRPOConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `from_pretrained`, and those that say where the configuration is."""
    init_kwargs = settings.model_init_kwargs if isinstance(settings.model_init_kwargs, dict) else {}
    return init_kwargs, {key: init_kwargs[key] for key in _HUB_ARGUMENTS if key in init_kwargs}


def _class_name(config: dict[str, Any]) -> str:
    name = config["_class_name"]
    return name if isinstance(name, str) else name[-1]  # a custom pipeline has its file before it


def _pipeline_config(name: str, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's `model_index.json`, without loading its models."""
    is_folder = os.path.isdir(name)
    if is_folder and not os.path.isfile(os.path.join(name, "model_index.json")):
        raise FileNotFoundError(
            f"`model` must be a pipeline's folder, got {name!r}, which has no model_index.json. Pass the folder that "
            "`pipe.save_pretrained(folder)` wrote."
        )
    if not is_folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"`model` must be a folder or a Hub repository (`owner/name`), got {name!r}: there is no such folder. "
            f"Check the path (the working directory is {os.getcwd()})."
        )
    try:
        return DiffusionPipeline.load_config(name, **hub_kwargs)
    except OSError as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"`model`={name!r} could not be loaded: {error}. Check the name, that the network or the local cache has it, "
        "and that you have accepted its license and are logged in (`hf auth login`)."
    )


# ---- Quantization ----


def make_quantization(settings: dict[str, Any], pipeline_class: type[DiffusionPipeline]) -> PipelineQuantizationConfig:
    """
    The diffusers configuration to pass to `from_pretrained` as `quantization_config`.

    Diffusers takes the same settings for its own models and those of transformers only where both libraries' classes
    have the same arguments, which is not so for torchao. Here each model gets its own library's class.

    Args:
        settings (`dict`): As [`MixGRPOConfig.quantization`]: `"quant_backend"`, `"quant_kwargs"`, and
            `"components_to_quantize"`, the names of models in the pipeline.
        pipeline_class (`type`): The pipeline's class, whose `__init__` names its models and their classes.

    Raises:
        `ValueError`: If the backend or a model is unknown, or the backend does not take the arguments.
        `ImportError`: If the backend's package is missing.
    """
    backend = settings["quant_backend"]
    names = settings["components_to_quantize"]
    names = [names] if isinstance(names, str) else names
    backends = sorted(DIFFUSERS_CONFIGS.keys() & TRANSFORMERS_CONFIGS.keys())
    if backend not in backends:
        raise ValueError(f"`quantization`: 'quant_backend' must be one of {', '.join(backends)}, got {backend!r}.")
    hints = typing.get_type_hints(pipeline_class.__init__)
    models = {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if unknown := [name for name in names if name not in models]:
        raise ValueError(
            f"`quantization`: 'components_to_quantize' must be among {', '.join(models)}, got {', '.join(unknown)}."
        )
    mapping = {}
    for name in names:
        configs = DIFFUSERS_CONFIGS if issubclass(models[name], ModelMixin) else TRANSFORMERS_CONFIGS
        try:
            mapping[name] = configs[backend](**_as_objects(backend, settings.get("quant_kwargs") or {}))
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

    made = getattr(quantization, kind)() if isinstance(kind, str) else config_from_dict(kind)
    return {**kwargs, "quant_type": made}
