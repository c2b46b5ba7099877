"""What a model calls the argument for its KV cache: `cache` from transformers 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect

from torch import nn
from transformers.generation import GenerationMixin

CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """The name that `model.forward` knows; that of transformers' own models where it takes any."""
    for function in (type(model).forward, GenerationMixin.prepare_inputs_for_generation):
        known = inspect.signature(function).parameters
        for name in CACHE_ARGUMENTS:
            if name in known:
                return name
    raise ValueError(
        f"{type(model).__name__} and transformers know none of {CACHE_ARGUMENTS}: this version is not supported"
    )


def given_cache(arguments: dict[str, object]) -> object | None:
    """The cache among a forward pass's arguments, under either name: transformers still takes the old one."""
    return next((found for name in CACHE_ARGUMENTS if (found := arguments.get(name)) is not None), None)
