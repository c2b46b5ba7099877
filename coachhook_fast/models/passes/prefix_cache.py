"""A KV cache whose contents never change: the columns before the lookup position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from coachhook_fast.models.cache_argument import cache_argument
from coachhook_fast.models.passes.forward import PartialModel, TokenBatch


class _FixedLayer(DynamicLayer):
    """Answers prefix + new keys and values, and keeps the prefix."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        # As lazy_initialization does, but for tensors of its own, copied from the host: a CUDA graph holds no copies.
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values [N, heads, P, width] of P columns in every block; blocks that are never run hold a stand-in.

    Empty where there are no columns before the lookup position.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def fill(cls, partial: PartialModel, last: int, tokens: TokenBatch, hidden: Tensor) -> PrefixCache:
        """Runs the blocks above `last` over the columns before the lookup position.

        Args:
            hidden: [N, T, m] output of block `last`.
        """
        rows, columns = hidden.shape[0], tokens.lookup
        # transformers reads the cached length off the first layer, whichever runs.
        stand_in = hidden.new_zeros(1, 1, 1, 1).expand(rows, 1, columns, 1)
        if columns == 0:
            return cls((), ())
        layers: list[Any] = [DynamicLayer() for _ in partial.blocks]
        inputs = {
            "input_ids": tokens.input_ids[:, :columns],
            "attention_mask": tokens.attention_mask[:, :columns],
            "position_ids": tokens.position_ids[:, :columns],
        }
        options: dict[str, Any] = {"use_cache": True, cache_argument(partial.model): Cache(layers=layers)}
        start, end = (last, hidden[:, :columns]), len(partial.blocks) - 1
        partial.run(inputs, resume=start, until=end, places=tokens.places(stop=columns), **options)
        # The `sequence` gate keeps its running state in further layers behind those of the blocks.
        above = layers[last + 1 : len(partial.blocks)]
        return cls(
            (stand_in,) * (last + 1) + tuple(layer.keys for layer in above),
            (stand_in,) * (last + 1) + tuple(layer.values for layer in above),
        )

    def select(self, rows: Tensor) -> PrefixCache:
        return PrefixCache(tuple(keys[rows] for keys in self.keys), tuple(values[rows] for values in self.values))

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Arguments that make one forward pass of `model` use these tensors as its cache."""
        if not self.keys:
            return {}
        layers: list[Any] = [_FixedLayer(keys, values) for keys, values in zip(self.keys, self.values, strict=True)]
        return {"use_cache": True, cache_argument(model): Cache(layers=layers)}
