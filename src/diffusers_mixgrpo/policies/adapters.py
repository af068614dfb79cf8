"""The LoRA to train: only one that a stock pipeline loads with the images it was trained with."""

import copy
import math
from typing import NamedTuple

from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from .base import PipelinePolicy


class TrainedWeights(NamedTuple):
    """Which weights of the transformer are trained: those of a LoRA, by the name of its adapter, or all."""

    is_lora: bool
    adapter_name: str


# Fields of LoraConfig that a stock pipeline reads again from the metadata of the saved LoRA, or that only say what to
# adapt. Other fields, of later versions of PEFT too, must have their defaults.
_LOADED_FIELDS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "inference_mode",
    "runtime_config",
    # Only descriptions
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    # Only read with an `init_lora_weights` of their own
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    # Checked by its value
    "init_lora_weights",
}
# The other initializations change the base weights or need data.
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal")

_WHAT_WORKS = (
    "Use LoraConfig(r=64, lora_alpha=128), if you like with `use_dora`, `use_rslora`, `lora_bias`, `rank_pattern`, "
    "`alpha_pattern`, or `init_lora_weights` 'gaussian' or 'orthogonal'."
)
SAVE_FUSED = (
    "save the pipeline with the LoRA in its weights (`pipe.fuse_lora()`, `pipe.unload_lora_weights()`, "
    "`pipe.save_pretrained(folder)`), and pass that folder as `model`"
)


def check_peft_config(config: PeftConfig, argument: str = "peft_config") -> None:
    """
    Refuse an adapter that a stock pipeline would not load with `load_lora_weights`, or load as another one.

    Args:
        config ([`~peft.PeftConfig`]): The adapter's configuration.
        argument (`str`): Where it comes from, for the message.

    Raises:
        `ValueError`: If the adapter is no LoRA, or has an option that is lost in the saved file.
    """
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`{argument}` must be a LoraConfig, got {type(config).__name__}, whose weights no stock pipeline would "
            f"load. {_WHAT_WORKS}"
        )
    assert isinstance(config, LoraConfig)
    start = config.init_lora_weights
    if start not in _INITIALIZATIONS:
        raise ValueError(
            f"`{argument}` must have an `init_lora_weights` that does not change the base model, got {start!r}: the "
            f"saved LoRA would not fit the published base model. {_WHAT_WORKS}"
        )
    default = LoraConfig()
    changed = [name for name, value in vars(config).items() if value != getattr(default, name, None)]
    if lost := sorted(name for name in changed if name not in _LOADED_FIELDS and not name.startswith("_")):
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"`{argument}` must have options that a stock pipeline loads, got {got}, which would be lost in the saved "
            f"LoRA. {_WHAT_WORKS}"
        )


def prepare_adapter(policy: PipelinePolicy, peft_config: PeftConfig | None) -> TrainedWeights:
    """
    Add the LoRA to the policy's transformer, or choose the one that it has.

    A loaded LoRA that is used at another weight than 1 gets that weight into its alpha, which is saved with it.

    Raises:
        `ValueError`: If the saved weights would not give the trained images in a stock pipeline: see the messages.
    """
    pipe = policy.pipe
    transformer = pipe.transformer
    loaded = list(getattr(transformer, "peft_config", {}))
    _refuse_other_adapters(pipe)
    if peft_config is not None:
        check_peft_config(peft_config)
        if loaded:
            raise ValueError(
                f"`peft_config` must be None for a pipeline that has a LoRA, got one for a transformer with {loaded}. "
                f"Leave it out to go on training that LoRA, remove it with `pipe.unload_lora_weights()`, or "
                f"{SAVE_FUSED}."
            )
        peft_config = copy.copy(peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = list(policy.lora_target_modules)
        transformer.add_adapter(peft_config, "default")
        return TrainedWeights(is_lora=True, adapter_name="default")
    if not loaded:
        return TrainedWeights(is_lora=False, adapter_name="default")
    active = transformer.active_adapters()
    if len(active) != 1:
        raise ValueError(
            f"The transformer must have one active LoRA to train, got {len(active)}: {active}. Choose one with "
            f"`pipe.set_adapters(name)`. To train one on top of the others, {SAVE_FUSED}."
        )
    name = active[0]
    check_peft_config(transformer.peft_config[name], f"pipe.transformer.peft_config[{name!r}]")
    _keep_scale(transformer, name)
    transformer.enable_adapters()
    transformer.set_adapter(name)  # also makes its weights trainable
    return TrainedWeights(is_lora=True, adapter_name=name)


def _refuse_other_adapters(pipe: DiffusionPipeline) -> None:
    """Refuse LoRAs that the saved weights would lack: fused ones, and those of other models than the transformer."""
    is_merged = any(isinstance(module, BaseTunerLayer) and module.merged for module in pipe.transformer.modules())
    if is_merged or getattr(pipe, "num_fused_loras", 0) > 0:
        names = ", ".join(sorted(getattr(pipe, "fused_loras", ()))) or "a LoRA"
        raise ValueError(
            f"`model` must be a pipeline without a fused LoRA, got one with {names} in its weights. It would be "
            "missing wherever the trained weights are loaded on the published base model. Call `pipe.unfuse_lora()`, "
            f"or {SAVE_FUSED}."
        )
    for name, component in pipe.components.items():
        if name != "transformer" and getattr(component, "peft_config", None):
            raise ValueError(
                f"`model` must be a pipeline with a LoRA of its transformer only, got one of its {name}, which would "
                "not be saved with the trained weights. Load the LoRA without it (`pipe.unload_lora_weights()`, then "
                f"`pipe.transformer.load_lora_adapter(...)`), or {SAVE_FUSED}."
            )


def _keep_scale(transformer: ModelMixin, name: str) -> None:
    """Put the weight of a LoRA, as of `pipe.set_adapters(name, 0.3)`, into its alpha. No image changes."""
    alphas = {}
    is_changed = False
    for module_name, module in transformer.named_modules():
        if not isinstance(module, LoraLayer) or name not in module.scaling:
            continue
        rank = module.r[name]
        alpha = module.scaling[name] * (math.sqrt(rank) if module.use_rslora.get(name) else rank)
        if alpha == 0:
            raise ValueError(
                f"The LoRA to train must have a weight other than 0, got 0 for {name!r} in {module_name}. Call "
                f"`pipe.set_adapters({name!r}, 1.0)`."
            )
        is_changed |= not math.isclose(alpha, module.lora_alpha[name], rel_tol=1e-6)
        alphas[module_name] = alpha
    if not is_changed:
        return
    config = transformer.peft_config[name]
    for module_name, alpha in alphas.items():
        transformer.get_submodule(module_name).lora_alpha[name] = alpha
    config.lora_alpha = next(iter(alphas.values()))
    config.alpha_pattern = {f"^{key}": alpha for key, alpha in alphas.items() if alpha != config.lora_alpha}
