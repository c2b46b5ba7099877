"""Where a model computes and what its parameters hold, wherever `device_map` has put them.

accelerate keeps the parameters of offloaded modules in host memory or on disk, and stand-ins on the meta device in the
module; its hook on the module says where it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_META = torch.device("meta")


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids and masks belong on."""
    device = next(model.parameters()).device
    if device == _META:
        return computing_device(model.get_input_embeddings(), device)  # type: ignore[operator]
    return device


def computing_device(module: nn.Module, device: torch.device) -> torch.device:
    """Where `module` computes, whose tensors are on `device`."""
    for hook in _hooks(module) if device == _META else ():
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return device


def held_parameter(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """What the model's parameter called `name` holds: itself, or what its stand-in stands for."""
    if parameter.device != _META:
        return parameter
    owner, _, own = name.rpartition(".")
    for hook in _hooks(model.get_submodule(owner)):
        if hook.weights_map is not None:
            return torch.as_tensor(hook.weights_map[own])
    return parameter


def check_loaded(model: nn.Module) -> None:
    """ValueError where a parameter is on the meta device and nothing knows its values: a model of shapes alone."""
    for name, parameter in model.named_parameters():
        if parameter.device == _META:
            owner = model.get_submodule(name.rpartition(".")[0])
            if not any(hook.weights_map is not None for hook in _hooks(owner)):
                raise ValueError(
                    f"the model's parameter {name} is on the meta device, which holds no values: load the weights first"
                )


def stands_twice(model: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether it is the stand-in of a tied parameter, which the model lists under its other name too: two stand-ins do
    not show that they are one."""
    return parameter.device == _META and name in (getattr(model, "all_tied_weights_keys", None) or {})


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's AlignDevicesHooks of a module."""
    first = getattr(module, "_hf_hook", None)
    for hook in getattr(first, "hooks", (first,)):
        if hasattr(hook, "weights_map") and hasattr(hook, "execution_device"):
            yield hook
