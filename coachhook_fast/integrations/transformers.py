"""transformers: what the `sequence` gate must learn from a forward pass, and where its running state lives.

The `calibrated` gate needs none of this. For `sequence`, a pre-hook on the model reads the padding mask, and running
statistics ride in the KV cache as one extra cache layer per edited layer: beams, crops and resets, which transformers
applies to every cache layer, then move the statistics along with the keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.gate import SequenceContext
from coachhook_fast.layer import HookLinear


class SequenceTracker:
    """Fills the hooks' shared `SequenceContext` before each forward pass of a transformers model."""

    def __init__(self, model: nn.Module, hooks: Sequence[HookLinear]) -> None:
        self.context = SequenceContext()
        self.num_blocks = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        for hook in hooks:
            hook.context = self.context
        self._num_hooks = len(hooks)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.context.clear()
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.context.mask = mask[:, -tokens.shape[1] :].to(torch.bool)
        elif isinstance(mask, Tensor):
            raise ValueError(
                f"the sequence gate cannot tell padding from an attention mask of {mask.dim()} dimensions: pass a 2-D "
                "attention_mask, or use the calibrated gate"
            )
        cache = kwargs.get("past_key_values")
        config: Any = model.config
        if cache is None and kwargs.get("use_cache", getattr(config, "use_cache", False)):
            from transformers import DynamicCache

            # The model would make its own after this hook, too late for the state to ride in it.
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if cache is not None:
            self.context.states = CacheStates(cache, self.num_blocks, self._num_hooks, tokens.shape[1])
        return args, kwargs

    def _after(self, *_: Any) -> None:
        self.context.clear()


class CacheStates:
    """Running (count, mean, M2) of each sequence, kept in extra layers of a transformers cache."""

    def __init__(self, cache: Any, num_blocks: int, num_hooks: int, query_length: int) -> None:
        from transformers.cache_utils import DynamicLayer

        self._query_length = query_length
        if not hasattr(cache, "layers"):
            raise ValueError(f"the sequence gate cannot keep its state in a {type(cache).__name__}: use calibrated")
        while len(cache.layers) < num_blocks + num_hooks:
            cache.layers.append(DynamicLayer())
        self._layers = cache.layers[num_blocks:]

    def load(self, index: int) -> Tensor | None:
        layer = self._layers[index]
        if not layer.is_initialized or layer.keys.numel() == 0:
            return None
        return layer.keys[:, 0, -1, :]

    def store(self, index: int, state: Tensor) -> None:
        # One entry per token slot, so that the layer's length follows the cache's through crops.
        slots = state[:, None, None, :].expand(-1, 1, self._query_length, -1)
        self._layers[index].update(slots, slots)
