"""What a hook layer reads of the module it wraps: sizes, weight, placement; and the names in its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.models.placement import computing_device


def save_as_base(_: nn.Module, tensors: dict[str, Any], prefix: str, __: Any) -> None:
    """State dict hook: the base's tensors under the names they have without a hook around it."""
    inner = f"{prefix}base_layer."
    for name in [name for name in tensors if name.startswith(inner)]:
        tensors[prefix + name.removeprefix(inner)] = tensors.pop(name)


def load_as_base(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """The way back."""
    base: Any = module.base_layer
    for name in base.state_dict():
        if prefix + name in tensors:
            tensors[f"{prefix}base_layer.{name}"] = tensors.pop(prefix + name)


def _is_conv1d(base: nn.Module) -> bool:
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
    if "forward" in base.__dict__ or (type(base) is not nn.Linear and not _is_conv1d(base)):
        return None
    weight = base.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return None
    return weight if type(base) is nn.Linear else weight.T


def features(base: nn.Module) -> tuple[int, int]:
    """``(d, m)`` of a linear-like module."""
    if _is_conv1d(base):
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
