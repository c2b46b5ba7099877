"""W + Δ for every token, as the weights of a plain checkpoint.

The merged weights are parameters of their own, which stand in the model's place for a while; the base's storage, which
other models may share, is never written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.hooks import Hooks, hooks_of
from coachhook_fast.models.base_layer import base_of, is_conv1d, linear_weight
from coachhook_fast.models.loading import forget_gguf, is_unpacked_gguf
from coachhook_fast.models.tensor_parallel import column_shard


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within the block the edited layers' weights are W + Δ, in their own dtype; the hooks stay, and add Δ once more
    unless they are off. Nobody else may run the model meanwhile.

    Raises:
        ValueError: as `check_mergeable`, or W + Δ does not fit the weights' dtype; the model is unchanged then.
    """
    hooks = _hooks(model)
    weights = _weights(hooks)
    before = [hook.base.weight for hook in hooks.hooks]
    try:
        for hook, weight in zip(hooks.hooks, weights, strict=True):
            hook.base.weight = weight
        yield
    finally:
        for hook, own in zip(hooks.hooks, before, strict=True):
            hook.base.weight = own


def write_merged(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes model and tokenizer with W + Δ into `folder`, as transformers does. ValueError as `merged`; OSError: it
    cannot be written."""
    loaded: Any = model
    with merged(model):
        if is_unpacked_gguf(loaded):
            forget_gguf(loaded)
        try:
            # Not the model's own name for it, which hooks have wrapped to warn that edits are no weights.
            type(loaded).save_pretrained(loaded, folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, in its words
            raise OSError(f"{folder} cannot be written: {error}") from error


def check_mergeable(model: nn.Module) -> None:
    """ValueError where no delta changes anything; the edited layers' weights are not plain numbers that are all here
    and theirs alone; or PEFT's layers stand in the model, whose names no plain checkpoint has."""
    hooks = _hooks(model)
    if not any(delta.rank for delta in _deltas(hooks)):
        raise ValueError("the edit set changes nothing: there is nothing to export")
    adapted = next((name for name, module in model.named_modules() if "base_layer" in module._modules), None)
    if adapted is not None:
        raise ValueError(f"{adapted} has a PEFT adapter beside it: give the base model without adapters to merge into")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer, hook in zip(hooks.layers, hooks.hooks, strict=True):
        base = base_of(hook)
        if linear_weight(base) is None or base.weight.is_meta or column_shard(base) is not None:
            raise ValueError(
                f"format must be 'peft' for this model, got 'merged': the {type(base).__name__} of block {layer} has "
                "no plain weight here to add to (quantised, offloaded or shared out over ranks)"
            )
        tied = names[id(base.weight)]
        if len(tied) > 1:
            raise ValueError(
                f"format must be 'peft' for this model, got 'merged': the weight of block {layer} is tied "
                f"({', '.join(tied)}), and Δ belongs to one of these alone"
            )


def _hooks(model: nn.Module) -> Hooks:
    hooks = hooks_of(model)
    if hooks is None or hooks.edit_set is None:
        raise ValueError("the model has no edits to export")
    return hooks


def _deltas(hooks: Hooks) -> tuple[LowRankDelta, ...]:
    assert hooks.edit_set is not None  # _hooks has looked
    return hooks.edit_set.deltas


def _weights(hooks: Hooks) -> list[nn.Parameter]:
    check_mergeable(hooks.model)
    found = []
    for layer, hook, delta in zip(hooks.layers, hooks.hooks, _deltas(hooks), strict=True):
        base: Any = base_of(hook)
        weight = _sum(base, delta)
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"W + Δ of block {layer} does not fit {weight.dtype}: load the model in another dtype")
        found.append(nn.Parameter(weight, requires_grad=base.weight.requires_grad))
    return found


@torch.no_grad()
def _sum(base: Any, delta: LowRankDelta) -> Tensor:
    """W + Δ in the layout and dtype of `base.weight`, rounded once."""
    own = linear_weight(base)
    assert own is not None  # check_mergeable has looked
    change = delta.dense().to(own.device)
    weight = (own.to(change.dtype) + change).to(own.dtype)
    return weight.T.contiguous() if is_conv1d(base) else weight
