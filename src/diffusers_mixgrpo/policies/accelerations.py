"""Cheaper forward passes for the deterministic steps of a rollout. Nothing is trained there: they may approximate."""

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer


@contextlib.contextmanager
def accelerated_ode(transformer: ModelMixin, cache: Any = None, merge_lora: bool = False) -> Iterator[None]:
    """
    A context with cheaper forward passes of the transformer. Afterwards it is as before, to the last bit.

    Args:
        transformer ([`~diffusers.ModelMixin`]): The policy's transformer.
        cache (one of diffusers' cache configurations, *optional*): Enabled empty, and disabled at the end.
        merge_lora (`bool`, defaults to `False`): Add the LoRA to copies of the weights instead of computing it beside
            them. Exact up to the rounding of the weights' dtype. The copies take the memory of these weights.
    """
    with contextlib.ExitStack() as stack:
        if merge_lora:
            stack.enter_context(_merged_lora(transformer))
        if cache is not None:
            transformer.enable_cache(cache)
            stack.callback(transformer.disable_cache)
        yield


@contextlib.contextmanager
def _merged_lora(transformer: ModelMixin) -> Iterator[None]:
    # peft would subtract what it has added, and leave a rounding error in the weights each time.
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
