"""The edits as a LoRA adapter in PEFT's format: Δ = U B is what LoRA calls B A.

PEFT is not needed to write it. The rank is one for all layers, since not every program reads `rank_pattern`; alpha is
the rank, so that the factors are taken as they are. Module names are whole paths: PEFT takes exactly those, where
"c_proj" alone would be GPT-2's attention too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.base_layer import base_of, is_conv1d
from coachhook_fast.models.wrappers import unwrapped

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's, of what its wrapper holds


class Changed(NamedTuple):
    """An edited layer that a fact has changed: its path in the model, its Δ in factors, and the base's own layer."""

    path: str
    delta: LowRankDelta
    base: nn.Module


def changed_layers(model: nn.Module, edit_set: EditSet) -> list[Changed]:
    """The layers that go into an adapter, in their order.

    Args:
        model: the base model, with or without hooks, for the names of its modules.

    Raises:
        ValueError: no layer is changed, or a layer's edits are no longer kept in factors (edits/delta.py): an adapter
            would be larger than the weights.
    """
    inner, config = unwrapped(model), edit_set.config
    layout = layout_of(inner, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp)
    found = []
    for layer, delta in zip(edit_set.layers, edit_set.deltas, strict=True):
        if delta.U is None:
            raise ValueError(
                f"format must be 'merged' for these edits, got 'peft': those of block {layer} fill their whole "
                f"[{delta.out_features}, {delta.in_features}] weight, and an adapter would be larger than that"
            )
        if delta.rank:
            path = layout.rewrite_module_tmp.format(layer)
            found.append(Changed(path, delta, base_of(layout.down_projection(inner, layer))))
    if not found:
        raise ValueError("the edit set changes nothing: there is nothing to export")
    return found


def lora_tensors(layers: list[Changed]) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names: of each layer `lora_A.weight` [r, d] and `lora_B.weight` [m, r], fp32 on
    the CPU, r the largest of the layers' ranks; smaller ones are filled up with zeros.

    Examples:
        >>> sorted(lora_tensors(changed_layers(model, edit_set)))[0]
        'base_model.model.model.layers.7.mlp.down_proj.lora_A.weight'
    """
    rank = _rank(layers)
    tensors = {}
    for path, delta, _ in layers:
        assert delta.U is not None  # changed_layers has looked
        more = rank - delta.rank
        down, up = nn.functional.pad(delta.B, (0, 0, 0, more)), nn.functional.pad(delta.U, (0, more))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down.to("cpu", torch.float32).contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up.to("cpu", torch.float32).contiguous()
    return tensors


def lora_config(layers: list[Changed], base_name: str) -> dict[str, Any]:
    """What `adapter_config.json` holds; fields that are not named have PEFT's defaults."""
    rank = _rank(layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": [layer.path for layer in layers],
        "fan_in_fan_out": all(is_conv1d(layer.base) for layer in layers),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def write_adapter(model: nn.Module, edit_set: EditSet, folder: Path, *, base_name: str) -> None:
    """Writes the adapter's two files into `folder`. ValueError as `changed_layers`; OSError: it cannot be written."""
    layers = changed_layers(model, edit_set)
    (folder / ADAPTER).write_bytes(to_bytes(lora_tensors(layers), metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(lora_config(layers, base_name), indent=2) + "\n", encoding="utf-8")


def _rank(layers: list[Changed]) -> int:
    return max(layer.delta.rank for layer in layers)
