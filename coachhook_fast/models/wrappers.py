"""What stands around a base model or its layers: wrappers that run it, adapters that add to it.

An edit set belongs to the base model. torch.compile, DistributedDataParallel and PEFT hold that model inside; PEFT also
puts layers of its own around those it adapts, which hold the original as `base_layer` or `original_module`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from coachhook_fast.models.placement import check_loaded

_INNER = ("base_layer", "original_module")  # children of PEFT's layers that are the base's
_COMPILED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside torch.compile's, DDP's and PEFT's wrappers, in whatever order they stand."""
    while True:
        inner: Any = model._modules.get(_COMPILED)
        if inner is None and list(model._modules) == ["module"] and not hasattr(model, "config"):
            inner = model._modules["module"]  # DistributedDataParallel, DataParallel
        if inner is None and hasattr(type(model), "get_base_model"):  # PeftModel
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None and type(model).__name__ == "PeftMixedModel":
            inner = model.base_model.model  # type: ignore[union-attr]
        if inner is None:
            return model
        model = inner


def slot(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """(parent, name) under which the base's own layer at `path` stands: within the adapters that PEFT has put there.

    Raises:
        AttributeError: there is no such module.
        ValueError: PEFT has put a copy of it, or of what it is a part of, in its place (`modules_to_save`): what is
            done to the base's own would not be heard.
    """
    parent_path, _, name = path.rpartition(".")
    parent, module = model.get_submodule(parent_path), model.get_submodule(path)
    while True:
        if name not in parent._modules or "original_module" in module._modules:
            raise ValueError(
                f"{path} is trained as a copy by PEFT (modules_to_save), which takes its place: merge_and_unload() "
                "first"
            )
        inner = next((each for each in ("base_layer", _COMPILED) if each in module._modules), None)
        if inner is None:
            return parent, name
        parent, name, module = module, inner, module._modules[inner]  # type: ignore[assignment]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name in the base model, name here, parameter) of all parameters but the adapters'."""
    for name, parameter in model.named_parameters():
        own = _base_name(model, name)
        if own is not None:
            yield own, name, parameter


def _base_name(model: nn.Module, name: str) -> str | None:
    """The name without wrappers; None for a parameter that only a wrapper has."""
    kept: list[str] = []
    module: Any = model
    for part in name.split("."):
        children = module._modules
        inner = next((each for each in _INNER if each in children), None)
        if inner is not None and part != inner:
            return None
        if part != inner and part != _COMPILED:
            kept.append(part)
        module = children.get(part)
        if module is None:  # the parameter itself
            break
    return ".".join(kept)


def base_to_edit(model: nn.Module) -> nn.Module:
    """The base model inside `model`; ValueError where its weights are not there, adapters take part in its passes, or
    parts of it are compiled by themselves."""
    model = unwrapped(model)
    compiled = next((name for name, module in model.named_modules() if _COMPILED in module._modules), None)
    if compiled is not None:
        raise ValueError(
            f"{compiled} is compiled by itself, and the editor's passes replace parts of it: edit the model first, and "
            "compile then"
        )
    check_loaded(model)
    check_no_adapters(model)
    return model


def check_no_adapters(model: nn.Module) -> None:
    """ValueError where PEFT's adapters take part in a pass of `model`, or are merged into its weights: edits would be
    made for the model with them, and belong to the one without."""
    found: set[str] = set()
    for module in model.modules():
        layer: Any = module
        if not any(name in module._modules for name in _INNER) or not hasattr(layer, "active_adapter"):
            continue
        active = layer.active_adapter
        if not getattr(layer, "disable_adapters", False):
            found.update([active] if isinstance(active, str) else active)
        found.update(getattr(layer, "merged_adapters", ()))
    if found:
        raise ValueError(
            f"the model has PEFT adapters that are active or merged ({', '.join(sorted(map(str, found)))}): "
            "merge_and_unload() makes a base model of them to edit; disable_adapter_layers() edits the one below"
        )
