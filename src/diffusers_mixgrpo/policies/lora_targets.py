"""
Which layers of a transformer a LoRA adapts: a setting that names none is refused.

PEFT itself minds only a LoRA without any layer. The names are enough for the check, so it comes before any weights.
"""

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn


# What PEFT adapts. Quantized layers are of these classes too.
_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


def check_targets(transformer: nn.Module, config: LoraConfig, own_targets: Sequence[str]) -> None:
    """
    Check that each layer, block and pattern that a LoRA's configuration names is one of the transformer.

    Args:
        transformer (`nn.Module`): The transformer, without a LoRA. It may be on the meta device.
        config ([`~peft.LoraConfig`]): The configuration.
        own_targets (`Sequence[str]`): The family's own `target_modules`, if the configuration has none.

    Raises:
        `ValueError`: If an entry of `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
            `rank_pattern` or `alpha_pattern` has no effect, or `target_modules` names what cannot be adapted.
    """
    modules = dict(transformer.named_modules())
    del modules[""]
    config = copy.copy(config)
    is_own = config.target_modules is None
    if is_own:
        config.target_modules = set(own_targets)
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        modules = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        config.target_modules = ".*"
    try:
        _check_names("exclude_modules", config, modules, own_targets)
        if not is_own:
            _check_names("target_modules", config, modules, own_targets)
        if config.layers_to_transform not in (None, []):
            _check_blocks(config, modules)
        _check_effect(config, modules, is_own)
    except re.error as error:
        raise ValueError(
            f"`peft_config` must have valid regular expressions, got {error.pattern!r}: {error}. Fix it, or pass a "
            "list of the ends of names of layers."
        ) from error


def _check_names(argument: str, config: LoraConfig, modules: dict[str, nn.Module], own_targets: Sequence[str]) -> None:
    """Each entry names layers."""
    everywhere = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    value = getattr(config, argument)
    label = f"`peft_config.{argument}`"
    fix = "Correct or remove it."
    if argument == "target_modules":
        label += " (`--lora_target_modules`)"
        fix = f"Without it the LoRA adapts {', '.join(own_targets)}."
        if not value:
            raise ValueError(f"{label} must name layers, got an empty list. {fix}")
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for entry in _entries(value):
        is_pattern = isinstance(value, str)
        found = _adapted(config, modules, **everywhere, target_modules=entry if is_pattern else {entry})
        if not found:
            rule = f"match whole names of layers, such as {linear[-1]!r}" if is_pattern else "end names of layers"
            near = "" if is_pattern else _nearest(entry, modules)
            raise ValueError(f"{label} must {rule}, got {entry!r}, which no layer has. {near}{fix}")
        other = [name for name in found if not isinstance(modules[name], _ADAPTABLE)]
        if argument == "target_modules" and other:
            raise ValueError(
                f"{label} must name linear layers, embeddings or convolutions, got {entry!r}, which is also the "
                f"{type(modules[other[0]]).__name__} {other[0]}. Name the layers in it. {fix}"
            )


def _check_blocks(config: LoraConfig, modules: dict[str, nn.Module]) -> None:
    """Each index and each list of blocks has layers to adapt."""
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and "." not in name]
    # Without a name, PEFT takes the number of the first list inside of another module, as language models have it.
    for pattern in _entries(config.layers_pattern) or [""]:
        if not pattern or not any(re.search(rf"(^|\.){pattern}\.\d+\.", name) for name in modules):
            raise ValueError(
                "`peft_config.layers_pattern` must be names of lists of blocks with `layers_to_transform`, got "
                f"{pattern or config.layers_pattern!r}. Those of this transformer are {', '.join(lists)}."
            )
    indices = config.layers_to_transform
    known = sorted({int(index) for name in modules for index in re.findall(r"\.(\d+)\.", name)})
    for index in [indices] if isinstance(indices, int) else indices:
        if not _adapted(config, modules, layers_to_transform=[index]):
            there = [each for each in known if _adapted(config, modules, layers_to_transform=[each])]
            raise ValueError(
                f"`peft_config.layers_to_transform` must be indices of blocks with layers to adapt, got {index}. With "
                f"these `target_modules` they are {', '.join(map(str, there)) or 'none'}."
            )


def _check_effect(config: LoraConfig, modules: dict[str, nn.Module], is_own: bool) -> None:
    """Each target has layers in the chosen blocks, and each pattern is for a layer that is adapted."""
    adapted = _adapted(config, modules)
    alone = [] if is_own or isinstance(config.target_modules, str) else sorted(config.target_modules)
    for entry in alone:
        if not _adapted(config, modules, target_modules={entry}, exclude_modules=None):
            raise ValueError(
                "`peft_config.target_modules` must name layers in the blocks of `layers_to_transform`, got "
                f"{entry!r}. Remove it, or name other blocks."
            )
    if not adapted:
        raise ValueError(
            "`peft_config` must leave layers to adapt, got an `exclude_modules` or `layers_to_transform` that leaves "
            "out all of them. Name fewer."
        )
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument) or ():
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                raise ValueError(
                    f"`peft_config.{argument}` must have keys that match the ends of names of adapted layers, got "
                    f"{pattern!r}. {_nearest(pattern, adapted)}Adapted are, for example, {', '.join(adapted[:3])}."
                )


def _adapted(config: LoraConfig, names: Iterable[str], **changes: Any) -> list[str]:
    """The names of modules that PEFT would adapt with changes to a configuration."""
    changed = copy.copy(config)
    for argument, value in changes.items():
        setattr(changed, argument, value)
    return [name for name in names if check_target_module_exists(changed, name)]


def _entries(value: str | Collection[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else sorted(value or ())


def _nearest(entry: str, names: Iterable[str]) -> str:
    """A question for the most similar end of a name, if there is one, and a space."""
    ends: set[str] = set()
    for name in names:
        parts = re.sub(r"^.*?\.\d+\.", "", name).split(".")
        ends |= {".".join(parts[i:]) for i in range(len(parts))}
    near = difflib.get_close_matches(entry, sorted(ends), n=1)
    return f"Did you mean {near[0]!r}? " if near else ""
