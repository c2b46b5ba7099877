"""What a hook layer is of the module it stands in for: its names and tensors, sizes, weight, placement."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.placement import computing_device

# What a module's tensors and checkpoints are made of: a hook layer holds the very dictionaries of its base.
_SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_state_dict_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "training",
)  # fmt: skip
_CALLED = ("forward", "_old_forward")  # how the base itself is called: the hook layer calls it


@functools.cache
def standing_in(hook: Any, base: Any) -> Any:
    """A class of hook layers that are instances of `base` too, as PEFT and quantisers ask; of `hook` alone where the
    two do not go together."""
    try:
        return type(hook.__name__, (hook, base), {"__module__": hook.__module__, "__doc__": hook.__doc__})
    except TypeError:  # a metaclass of its own, as TorchScript's modules have
        return hook


def empty_hook(hook: Any, base: Any) -> Any:
    """A hook layer of class `hook` for a base of that class, to be filled: by its constructor, a pickle or a copy."""
    return object.__new__(standing_in(hook, base))


def stand_in(hook: nn.Module, base: nn.Module, own: type) -> None:
    """`hook` holds what `base` holds: its tensors, as the same objects under the same names, and its attributes.

    A wrapper that holds the base as a child renames all tensors of it, and what looks for modules or parameters by name
    (PEFT, accelerate, checkpoints, DDP) finds others than in the base model. The base is no child here: whoever
    replaces a parameter of the hook layer replaces it in the base, for their dictionaries are one.

    own: the class of hook layers, whose attributes are not the base's.
    """
    for name, value in base.__dict__.items():
        is_own = name in hook.__dict__ or hasattr(own, name)
        if name in _SHARED or not (is_own or name in _CALLED):
            hook.__dict__[name] = value
    hook.__dict__["base"] = base


def given_back(hook: nn.Module) -> nn.Module:
    """The base of a hook layer that leaves, with the hook that accelerate has put on the hook layer since."""
    base = base_of(hook)
    if "_old_forward" in hook.__dict__:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(base, hook._hf_hook)  # type: ignore[arg-type]
    return base


def base_of(module: nn.Module) -> nn.Module:
    """The module that a hook layer stands in for; any other module itself."""
    base = module.__dict__.get("base")  # modules that are children are kept elsewhere
    return base if isinstance(base, nn.Module) else module


def is_conv1d(base: nn.Module) -> bool:
    """transformers' Conv1D, known by its attributes: weight ``[d, m]``, output ``addmm(bias, x, weight)``."""
    return type(base).__name__ == "Conv1D" and hasattr(base, "nf")


def plain_weight(base: nn.Module) -> Tensor | None:
    """The weight ``[m, d]`` (a view) that one op may read instead of calling `base`.

    None where only a call will do: subclasses, quantised or adapted layers, a replaced `forward`
    (accelerate's offloading), hooks of the user's.
    """
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return None
    return linear_weight(base)


def linear_weight(base: nn.Module) -> Tensor | None:
    """The weight ``[m, d]`` (a view) that the module's own `forward` multiplies with, whatever hooks stand around it;
    None where it does not say."""
    if "forward" in base.__dict__ or (type(base) is not nn.Linear and not is_conv1d(base)):
        return None
    weight = base.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return None
    return weight if type(base) is nn.Linear else weight.T


def features(base: nn.Module) -> tuple[int, int]:
    """``(d, m)`` of a linear-like module."""
    if is_conv1d(base):
        d, m = base.weight.shape  # type: ignore[union-attr,misc]
        return int(d), int(m)
    d, m = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not isinstance(d, int) or not isinstance(m, int):
        raise TypeError(f"base_layer must tell in_features and out_features, got {type(base).__name__}")
    return d, m


def serving_placement(base: nn.Module, dtype: torch.dtype) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the serving copy: the base's first floating tensor's; `dtype` where it has none."""
    device = torch.device("cpu")
    for tensor in (*base.parameters(), *base.buffers()):
        device = computing_device(base, tensor.device)
        if tensor.is_floating_point():
            return tensor.dtype, device
    return dtype, device
