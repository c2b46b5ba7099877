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
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from coachhook_fast.hooks.compiled import eagerly
from coachhook_fast.hooks.gate import SequenceContext, ThreadContexts
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.models.cache_argument import CACHE_ARGUMENTS, cache_argument, given_cache

_MASK = "coachhook_mask"
_USE_CALIBRATED = "use the calibrated gate (EditConfig(gate='calibrated')), which needs no sequence"


class SequenceTracker:
    """Fills the hooks' `SequenceContext` before each forward pass of a transformers model."""

    def __init__(self, model: nn.Module, hooks: Sequence[HookLinear]) -> None:
        self.contexts = ThreadContexts()
        self.num_blocks = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
        for hook in hooks:
            hook.context = self.contexts
        self._model = model
        self._cache_argument = cache_argument(model)
        self._hooks = tuple(hooks)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        wrappers = {
            "prepare_inputs_for_generation": _hand_on_mask,
            "generate": _refuse_chunks,
            "init_continuous_batching": _refuse_continuous_batching,
        }
        self._wrapped = [name for name, function in wrappers.items() if wrap_method(model, name, function)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name in self._wrapped:
            del self._model.__dict__[name]
        for hook in self._hooks:
            hook.context = None

    @eagerly
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        context = self.contexts.here()
        context.clear()
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        length = tokens.shape[1]
        generating = _MASK in kwargs
        mask = kwargs.pop(_MASK) if generating else kwargs.get("attention_mask")
        if "block_table" in kwargs or "write_index" in kwargs:
            raise ValueError(f"the sequence gate cannot follow a paged cache: {_USE_CALIBRATED}")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            context.mask = mask[:, -length:].to(torch.bool)
        elif mask is not None:
            kind = f"of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"that is a {type(mask).__name__}"
            raise ValueError(
                f"the sequence gate cannot tell padding from an attention_mask {kind}: pass a 2-D one, "
                f"or {_USE_CALIBRATED}"
            )
        cache: Any = given_cache(kwargs)
        config: Any = model.config
        if cache is None and kwargs.get("use_cache", getattr(config, "use_cache", False)):
            # The model would make its own after this hook, too late for the state to ride in it.
            cache = kwargs[self._cache_argument] = DynamicCache(config=config)
        if length > 1 and not torch.compiler.is_dynamo_compiling():
            _look_for_packing(context, mask, kwargs, cache)
        if cache is not None:
            context.states = CacheStates(cache, self.num_blocks, len(self._hooks))
        keep = kwargs.get("logits_to_keep")
        if generating and isinstance(keep, int) and keep > 1:
            # Assisted decoding's first pass: the prompt and keep - 1 drafted tokens.
            context.prompt_length = length - keep + 1
        return args, kwargs

    @eagerly
    def _after(self, *_: Any) -> None:
        self.contexts.here().clear()


def _look_for_packing(context: SequenceContext, mask: Tensor | None, kwargs: dict[str, Any], cache: Any) -> None:
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
        kwargs["use_cache"] = False
        for name in CACHE_ARGUMENTS:
            kwargs.pop(name, None)
    context.cu_seqlens = boundaries.to(torch.int32)


class LastState(StaticLayer):
    """A layer of a static cache that keeps the state after the last token only: such caches are never cropped."""

    def __init__(self) -> None:
        super().__init__(max_cache_len=1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.copy_(key_states[:, :, -1:])
        self.values.copy_(value_states[:, :, -1:])
        self.cumulative_length.add_(key_states.shape[2])
        return self.keys, self.values


class CacheStates:
    """Running (count, mean, M2) of each sequence, kept in extra layers of a transformers cache, one entry a token."""

    def __init__(self, cache: Any, num_blocks: int, num_hooks: int) -> None:
        if not hasattr(cache, "layers"):
            raise ValueError(f"the sequence gate cannot keep its state in a {type(cache).__name__}: {_USE_CALIBRATED}")
        while len(cache.layers) < num_blocks:  # a cache that makes its layers as the blocks first ask for them
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        static = len(cache.layers) > 0 and cache.layers[0].is_compileable
        while len(cache.layers) < num_blocks + num_hooks:
            cache.layers.append(LastState() if static else DynamicLayer())
        self._layers = cache.layers[num_blocks:]

    def load(self, index: int) -> Tensor | None:
        layer = self._layers[index]
        if not layer.is_initialized or layer.keys.numel() == 0:
            return None
        return layer.keys[:, 0, -1]  # after a reset of a static cache: zeros, a count of 0

    def store(self, index: int, states: Tensor) -> None:
        self._layers[index].update(states[:, None], states[:, None])


# -------------------------------------------------------------------------------- methods of the model, wrapped


def _hand_on_mask(model: Any, *args: Any, **kwargs: Any) -> Any:
    inputs = type(model).prepare_inputs_for_generation(model, *args, **kwargs)
    mask = kwargs.get("attention_mask")
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs["inputs_embeds"]
    # Sliced and copied: the whole mask, and a slice's stride with it, may grow by a column a step, for which a compiled
    # step would be compiled anew.
    if mask is not None:
        mask = mask[:, -tokens.shape[1] :].clone(memory_format=torch.contiguous_format)
    inputs[_MASK] = mask
    return inputs


def wrap_method(model: Any, name: str, function: Callable[..., Any]) -> bool:
    """Puts `function(model, ...)` in the place of a method, until the attribute is deleted; False where it has none."""
    method = getattr(model, name, None)
    if method is None:
        return False
    wrapper = functools.partial(function, model)  # not a closure: a deep copy then wraps the copied model
    wrapper.__signature__ = inspect.signature(method)  # type: ignore[attr-defined] # generate() looks at it
    model.__dict__[name] = wrapper
    return True


def _refuse_chunks(model: Any, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if size is not None:
        raise ValueError(
            f"the sequence gate judges a prompt's tokens together, so prefill_chunk_size={size} cannot cut it: "
            f"leave it out, or {_USE_CALIBRATED}"
        )
    return type(model).generate(model, *args, **kwargs)


def _refuse_continuous_batching(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"the sequence gate judges a prompt's tokens together, which continuous batching cuts: {_USE_CALIBRATED}"
    )
