"""Hooks: the hook layers installed in one model, and the switches an operator uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from coachhook_fast.architectures import Layout, down_projection_size
from coachhook_fast.edit_set import EditSet
from coachhook_fast.integrations.transformers import SequenceTracker
from coachhook_fast.layer import HookLinear

ATTRIBUTE = "coachhook"


class Hooks:
    """The hook layers of one model, reachable as `model.coachhook`.

    Installing replaces each edited down-projection by a `HookLinear` around it; `unload` puts the originals back. Base
    weights are never written, so `disabled()` and `unload()` give the base model bit for bit.
    """

    def __init__(self, model: nn.Module, layout: Layout, layers: Sequence[int], gate: str) -> None:
        """Raises ValueError, with the model unchanged, if it has hooks already or a layer is out of range."""
        if hasattr(model, ATTRIBUTE):
            raise ValueError("model already has hooks: call model.coachhook.unload() first")
        self.model = model
        self.layout = layout
        self.layers = checked_layers(model, layout, layers)
        originals = [layout.down_projection(model, layer) for layer in self.layers]
        self.hooks = [HookLinear(base, gate=gate, index=index) for index, base in enumerate(originals)]
        self._tracker = SequenceTracker(model, self.hooks) if gate == "sequence" else None
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            self._place(layer, hook)
        self.edit_set: EditSet | None = None
        setattr(model, ATTRIBUTE, self)

    def publish(self, edit_set: EditSet) -> None:
        """Makes `edit_set` the one that is served."""
        for hook, delta, threshold in zip(self.hooks, edit_set.deltas, edit_set.thresholds, strict=True):
            hook.set_delta(delta, threshold.value, moments=(threshold.mean, threshold.std))
        self.edit_set = edit_set

    def set_modes(self, modes: Sequence[str]) -> None:
        """Mode of each hook: "off", "gated" or "always" (the temporary hook of an update)."""
        for hook, mode in zip(self.hooks, modes, strict=True):
            hook.mode = mode

    def enable(self) -> None:
        """Edits take effect (the state after installing)."""
        self.set_modes(["gated"] * len(self.hooks))

    def disable(self) -> None:
        """The base model, bit for bit, until `enable`."""
        self.set_modes(["off"] * len(self.hooks))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit, within the `with` block."""
        modes = [hook.mode for hook in self.hooks]
        try:
            self.disable()
            yield
        finally:
            self.set_modes(modes)

    def unload(self) -> nn.Module:
        """Takes the hooks out and returns the untouched model."""
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            self._place(layer, hook.base_layer)
        if self._tracker is not None:
            self._tracker.remove()
        delattr(self.model, ATTRIBUTE)
        return self.model

    def _place(self, layer: int, module: nn.Module) -> None:
        parent, _, name = self.layout.rewrite_module_tmp.format(layer).rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)


def checked_layers(model: nn.Module, layout: Layout, layers: Sequence[int]) -> tuple[int, ...]:
    """`layers` if each is a block of the model whose down-projection has the same shape; else ValueError."""
    count = len(layout.blocks(model))
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are out of range: the model has blocks 0 to {count - 1}")
    shapes = {layer: down_projection_size(layout.down_projection(model, layer)) for layer in layers}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"layers must have down-projections of one shape, got {shapes}")
    return tuple(layers)


def hooks_of(model: nn.Module) -> Hooks | None:
    """The hooks installed in `model`, None where there are none."""
    found: Any = getattr(model, ATTRIBUTE, None)
    return found
