"""Cheaper passes for the deterministic steps of a rollout. Nothing is trained there, so they may be approximated."""

import contextlib
from collections.abc import Iterator
from typing import Any

import diffusers
from peft.tuners.tuners_utils import BaseTunerLayer


def make_cache(settings: dict[str, Any] | str | None) -> Any:
    """
    A cache configuration of diffusers, of its class's `name` and its arguments.

    Raises:
        `ValueError`: If there is no such class, or it does not take these arguments.
    """
    if not isinstance(settings, dict):
        return None
    kwargs = {key: value for key, value in settings.items() if key != "name"}
    names = [name for name in dir(diffusers) if name.endswith("CacheConfig")]
    if settings.get("name") not in names:
        raise ValueError(
            f"`ode_cache` must have a 'name' among {', '.join(names)}, got {settings}. For example "
            '{"name": "TaylorSeerCacheConfig", "cache_interval": 2, "disable_cache_before_step": 1, '
            '"use_lite_mode": true}.'
        )
    try:
        return getattr(diffusers, settings["name"])(**kwargs)
    except TypeError as error:
        raise ValueError(f"`ode_cache={settings}`: {error}.") from error


@contextlib.contextmanager
def accelerated_ode(transformer: Any, cache: Any = None, merge_lora: bool = False) -> Iterator[None]:
    """
    Inside, passes of the transformer are cheaper; afterwards it is as before, to the last bit.

    Args:
        transformer (a diffusers model): The policy's.
        cache (a cache configuration of diffusers, *optional*): Switched on with nothing in it, and off again.
        merge_lora (`bool`, defaults to `False`): Add the LoRA to copies of the weights, instead of computing it beside
            them. The same up to the rounding of the weights' dtype. The copies take as much memory as those weights.
    """
    with contextlib.ExitStack() as stack:
        if merge_lora:
            stack.enter_context(_merged_lora(transformer))
        if cache is not None:
            transformer.enable_cache(cache)
            stack.callback(transformer.disable_cache)
        yield


@contextlib.contextmanager
def _merged_lora(transformer: Any) -> Iterator[None]:
    # peft would subtract what it has added, and each time a rounding error would stay in the weights.
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    originals = [(p, p.data) for layer in layers for p in layer.get_base_layer().parameters()]
    try:
        for parameter, data in originals:
            parameter.data = data.clone()
        for layer in layers:
            layer.merge()
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()
