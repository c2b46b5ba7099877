"""Attention among packed rows, in place of a model's own.

transformers' models reach their attention through an interface that is named in their configuration. Within
`packed_attention` some modules' configuration names another one, `torch.ops.coachhook.packed_attention`: their model
then computes rows of tokens one behind the other, [1, S, m], without padding, and only here does a token know its row.
Other models, also of the same configuration, see nothing of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from coachhook_fast.ops.packed_attention import packed_attention as attention

_NAME = "coachhook_packed"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True)
class Packing:
    """Where packed rows begin, and what stands before them.

    Attributes:
        cu_seqlens: [N + 1] int64, row n has the tokens from cu_seqlens[n] on; max_seqlen: most tokens a row.
        keys, values: [N, Hk, P, D] of the prefix, fp32 or fp64, one for each attention module; empty where P is 0.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def attention_modules(blocks: Sequence[nn.Module]) -> list[nn.Module] | None:
    """The attention module of every block; None unless each has just one and it computes causal scaled dot product
    attention by transformers' interface."""
    found = [[module for module in block.modules() if _by_interface(module)] for block in blocks]
    if any(len(modules) != 1 for modules in found):
        return None
    return [modules[0] for modules in found]


def _by_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    if _REGISTRY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    config = getattr(module, "config", None)
    # A model may have put a function of its own in this place.
    is_usual = forward.__globals__[_REGISTRY].get("sdpa") is sdpa_attention_forward
    is_usual = is_usual and getattr(module, "is_causal", True)
    return is_usual and getattr(config, "_attn_implementation", None) == "sdpa"


@contextmanager
def packed_attention(modules: Sequence[nn.Module], packing: Packing) -> Iterator[None]:
    """Within it `modules` compute attention among the rows of `packing`. Their masks are [N, 1 or H, Q, P + Q] still,
    as for padded rows, or None for causal attention.

    Raises:
        RuntimeError: a module has computed its attention in another way, so rows were mixed.
    """
    numbers = {id(module): i for i, module in enumerate(modules)}
    configs: list[Any] = [module.config for module in modules]
    token = _CURRENT.set((packing, numbers))
    try:
        for module, config in zip(modules, configs, strict=True):
            module.__dict__["config"] = _Renamed(config)
        yield
        if numbers:
            raise RuntimeError(
                f"{len(numbers)} of {len(modules)} attention modules did not use transformers' interface"
            )
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.__dict__["config"] = config
        _CURRENT.reset(token)


class _Renamed:
    """A configuration that names the attention of this module."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


_CURRENT: ContextVar[tuple[Packing, dict[int, int]]] = ContextVar("coachhook_packing")


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, H, S, D]
    key: Tensor,  # [1, Hk, S, D]
    value: Tensor,  # [1, Hk, S, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [1, S, H, Dv]
    packing, numbers = _CURRENT.get()
    # None of the known families in eval mode; if ever, better no numbers than others.
    if dropout or kwargs.get("position_bias") is not None:
        raise RuntimeError(f"{type(module).__name__} attends with dropout or a position bias: rows cannot be packed")
    number = numbers.pop(id(module))  # those that are left have not computed theirs
    # As torch's attention does on CPU, whatever the model computes in.
    dtype = torch.promote_types(query.dtype, torch.float32)
    # squeeze: its way back is no work, where a selection's fills and copies
    q, k, v = (tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value))
    rows = packing.cu_seqlens.numel() - 1
    if packing.keys:
        prefix_k, prefix_v = packing.keys[number], packing.values[number]
    else:
        prefix_k, prefix_v = (t.new_empty(rows, t.shape[1], 0, t.shape[2]) for t in (k, v))
    mask = attention_mask if attention_mask is None or attention_mask.dtype == torch.bool else attention_mask.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _ = attention(q, k, v, prefix_k, prefix_v, mask, packing.cu_seqlens, packing.max_seqlen, scale)
    return out.to(query.dtype)[None], None


AttentionInterface.register(_NAME, _attend)
