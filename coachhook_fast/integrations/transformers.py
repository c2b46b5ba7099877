"""transformers: what the `sequence` gate must learn from a forward pass, and where its running state lives.

The `calibrated` gate needs none of this. For `sequence`, a pre-hook on the model reads padding and packing, and the
running statistics ride in the KV cache as one extra cache layer per edited layer: beams, crops and resets, which
transformers applies to every cache layer, then move the statistics along with the keys and values.

`generate()` turns the padding mask into a 4-D one before the forward pass where the cache is static, so
`prepare_inputs_for_generation` is wrapped and hands the 2-D mask on in an argument of its own, which the pre-hook takes
out again. What cuts a prompt into pieces (`prefill_chunk_size`, continuous batching) is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.gate import SequenceContext
from coachhook_fast.layer import HookLinear

_MASK = "coachhook_mask"
_USE_CALIBRATED = "use the calibrated gate (EditConfig(gate='calibrated')), which needs no sequence"


class SequenceTracker:
    """Fills the hooks' shared `SequenceContext` before each forward pass of a transformers model."""

    def __init__(self, model: nn.Module, hooks: Sequence[HookLinear]) -> None:
        self.context = SequenceContext()
        self.num_blocks = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        for hook in hooks:
            hook.context = self.context
        self._model = model
        self._hooks = tuple(hooks)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._wrapped: list[str] = []
        self._wrap("prepare_inputs_for_generation", _hand_on_mask)
        self._wrap("generate", _refuse_chunks)
        self._wrap("init_continuous_batching", _refuse_continuous_batching)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name in self._wrapped:
            del self._model.__dict__[name]
        for hook in self._hooks:
            hook.context = None

    def _wrap(self, name: str, make: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]) -> None:
        method = getattr(self._model, name, None)
        if method is None:
            return
        wrapper = functools.wraps(method)(make(self._model, method))
        wrapper.__signature__ = inspect.signature(method)  # type: ignore[attr-defined] # generate() looks at it
        self._model.__dict__[name] = wrapper
        self._wrapped.append(name)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.context.clear()
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        length = tokens.shape[1]
        generating = _MASK in kwargs
        mask = kwargs.pop(_MASK) if generating else kwargs.get("attention_mask")
        if "block_table" in kwargs or "write_index" in kwargs:
            raise ValueError(f"the sequence gate cannot follow a paged cache: {_USE_CALIBRATED}")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.context.mask = mask[:, -length:].to(torch.bool)
        elif mask is not None:
            kind = f"of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise ValueError(
                f"the sequence gate cannot tell padding from an attention_mask {kind}: pass a 2-D one, or {_USE_CALIBRATED}"
            )
        cache = kwargs.get("past_key_values")
        config: Any = model.config
        if cache is None and kwargs.get("use_cache", getattr(config, "use_cache", False)):
            from transformers import DynamicCache

            # The model would make its own after this hook, too late for the state to ride in it.
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if length > 1 and not torch.compiler.is_compiling():
            self._look_for_packing(mask, kwargs, cache)
        if cache is not None:
            self.context.states = CacheStates(cache, self.num_blocks, len(self._hooks))
        keep = kwargs.get("logits_to_keep")
        if generating and isinstance(keep, int) and keep > 1:
            # Assisted decoding's first pass: the prompt and keep - 1 drafted tokens.
            self.context.prompt_length = length - keep + 1
        return args, kwargs

    def _look_for_packing(self, mask: Tensor | None, kwargs: dict[str, Any], cache: Any) -> None:
        """Several sequences in a row, told by cu_seq_lens_q or by positions that start again."""
        boundaries = kwargs.get("cu_seq_lens_q")
        positions = kwargs.get("position_ids")
        if isinstance(mask, Tensor) and bool((mask > 1).any()):
            raise ValueError(
                "the sequence gate reads attention_mask as 0 for padding and 1 for tokens, got larger values: pass "
                "packed sequences with position_ids or cu_seq_lens_q"
            )
        if boundaries is None and isinstance(positions, Tensor) and positions.dim() == 2:
            steps = positions[:, 1:] - positions[:, :-1] != 1
            if mask is not None:
                real = mask[:, -positions.shape[1] :].to(torch.bool)
                steps = steps & real[:, 1:] & real[:, :-1]
            if not bool(steps.any()):
                return
            # Flat over all rows; each row begins a sequence too.
            starts = torch.nn.functional.pad(steps, (1, 0), value=True).flatten().nonzero().flatten()
            boundaries = torch.cat([starts, starts.new_tensor([positions.numel()])])
        if boundaries is None:
            return
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"the sequence gate cannot go on with packed sequences in a cache: {_USE_CALIBRATED}")
        if cache is not None and kwargs.get("use_cache") is not False:
            # Nothing can go on from a cache of packed sequences; without one the pass is judged all the same.
            kwargs["use_cache"], kwargs["past_key_values"] = False, None
        self.context.cu_seqlens = boundaries.to(torch.int32)

    def _after(self, *_: Any) -> None:
        self.context.clear()


class CacheStates:
    """Running (count, mean, M2) of each sequence, kept in extra layers of a transformers cache, one entry a token."""

    def __init__(self, cache: Any, num_blocks: int, num_hooks: int) -> None:
        from transformers.cache_utils import DynamicLayer, StaticLayer

        if not hasattr(cache, "layers"):
            raise ValueError(f"the sequence gate cannot keep its state in a {type(cache).__name__}: {_USE_CALIBRATED}")
        while len(cache.layers) < num_blocks:  # a cache that makes its layers as the blocks first ask for them
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        static = bool(cache.layers) and cache.layers[0].is_compileable
        while len(cache.layers) < num_blocks + num_hooks:
            cache.layers.append(StaticLayer(cache.get_max_length()) if static else DynamicLayer())
        self._layers = cache.layers[num_blocks:]

    def load(self, index: int) -> Tensor | None:
        layer = self._layers[index]
        if not layer.is_initialized or layer.keys.numel() == 0:
            return None
        if layer.is_compileable:  # after a reset the length is 0 and so is the count in the first entry
            last = (layer.cumulative_length - 1).clamp(min=0).reshape(1)
            return layer.keys.index_select(2, last)[:, 0, 0]
        return layer.keys[:, 0, -1]

    def store(self, index: int, states: Tensor) -> None:
        self._layers[index].update(states[:, None], states[:, None])


# -------------------------------------------------------------------------------- methods of the model, wrapped


def _hand_on_mask(model: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
        inputs = method(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        # Sliced: the whole mask grows by a column a step, which would recompile every step.
        inputs[_MASK] = None if mask is None else mask[:, -tokens.shape[1] :]
        return inputs

    return prepare_inputs_for_generation


def _refuse_chunks(model: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
        size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if size is not None:
            raise ValueError(
                f"the sequence gate judges a prompt's tokens together, so prefill_chunk_size={size} cannot cut it: leave "
                f"it out, or {_USE_CALIBRATED}"
            )
        return method(*args, **kwargs)

    return generate


def _refuse_continuous_batching(model: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"the sequence gate judges a prompt's tokens together, which continuous batching cuts: {_USE_CALIBRATED}"
        )

    return init_continuous_batching
