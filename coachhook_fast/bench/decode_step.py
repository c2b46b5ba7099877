"""A whole model's decode step with the default edit's hooks, against the same model without.

The model is a random Llama of SmolLM2-135M's size: a step's time does not depend on what the weights say.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.bench import graphs
from coachhook_fast.bench import rows as common
from coachhook_fast.bench.gated_problem import random_delta
from coachhook_fast.config import EditConfig
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.hooks.shared_weights import shared_weight_copy
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.cache_argument import cache_argument

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
RANK = 100
BATCHES = (1, 8)
PROMPT = 64  # tokens in the cache before the step
TURNS = 40


def step_rows(device: str, sizes: dict[str, Any] | None = None) -> Iterator[common.Row]:
    """One call of the model and its end, as generate() makes them."""
    for batch in BATCHES:
        plain, edited, checked = _sides(device, sizes or SIZES, batch)
        steps = [edited, plain]
        with torch.inference_mode():
            for step in steps * 3:
                step()
            ours, theirs = common.in_turns(steps, TURNS)
        yield _row(f"decode step, batch {batch}", "eager", ours, theirs, checked, sizes or SIZES, batch)


def graph_rows(device: str, sizes: dict[str, Any] | None = None) -> Iterator[common.Row]:
    """The same step captured in a CUDA graph."""
    for batch in BATCHES:
        plain, edited, checked = _sides(device, sizes or SIZES, batch)
        replay, (found,) = graphs.captured([edited], 1)
        plain_replay, _ = graphs.captured([plain], 1)
        ours, theirs = graphs.replayed([replay, plain_replay], TURNS)
        with torch.inference_mode():
            expected = edited()
        same = bool((found - expected).abs().max() <= 0.02 * expected.abs().max())
        yield _row(f"decode step, batch {batch}", "graph", ours, theirs, checked and same, sizes or SIZES, batch)


def _sides(device: str, sizes: dict[str, Any], batch: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], bool]:
    """(step of the model without hooks, step with, whether they answer as they must)."""
    torch.manual_seed(0)
    base = _model(device, sizes)
    model = shared_weight_copy(base)
    config = EditConfig().resolved(sizes["num_hidden_layers"], sizes["intermediate_size"])
    assert config.layers is not None
    hooks = Hooks(model, layout_of(model), config.layers, config.gate)
    deltas = tuple(_delta(sizes, device) for _ in config.layers)
    tokens = torch.randint(sizes["vocab_size"], (batch, PROMPT + 1), device=device)
    plain, edited = decode_step(base, tokens), decode_step(model, tokens)

    def publish(tau: float) -> None:
        hooks.publish(EditSet("", config, (), deltas, (Threshold(tau),) * len(deltas)))

    with torch.inference_mode():
        publish(0.0)
        unedited, open_gate = plain(), edited()
        hooks.set_modes(["always"] * len(deltas))
        always = edited()
        hooks.enable()
        publish(1e30)  # ordinary text: no token fires
        closed = edited()
    effect = (always - unedited).abs().max()
    right = max((open_gate - always).abs().max(), (closed - unedited).abs().max()) < 0.25 * effect
    return plain, edited, bool(right)


def _model(device: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def _delta(sizes: dict[str, Any], device: str) -> LowRankDelta:
    """Half the base's size, so that what it does shows behind thirty layers' rounding."""
    delta = random_delta(sizes["hidden_size"], sizes["intermediate_size"], RANK, torch.float32, device)
    return LowRankDelta(delta.U, delta.B * 100)


def decode_step(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Logits of the last of `tokens` behind the cache of the others, which every call finds as the first did."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    arguments = {cache_argument(model): cache, "use_cache": True}
    with torch.inference_mode():
        model(tokens[:, :-1], **arguments)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    return functools.partial(_once, model, tokens[:, -1:].contiguous(), arguments, cache, held)


def _once(model: Any, tokens: Tensor, arguments: dict[str, Any], cache: Any, held: list[Any]) -> Tensor:
    logits: Tensor = model(tokens, **arguments).logits
    for layer, (keys, values) in zip(cache.layers, held, strict=True):
        layer.keys, layer.values = keys, values
    return logits


def _row(
    work: str,
    timing: str,
    ours: list[float],
    theirs: list[float],
    checked: bool,
    sizes: dict[str, Any],
    batch: int,
) -> common.Row:
    config = EditConfig().resolved(sizes["num_hidden_layers"], sizes["intermediate_size"])
    count = len(config.layers or ())
    m, d = sizes["hidden_size"], sizes["intermediate_size"]
    # parameters that a step reads: attention, FFN and head
    heads = 2 * (1 + sizes["num_key_value_heads"] / sizes["num_attention_heads"])
    weights = sizes["num_hidden_layers"] * (heads * m * m + 3 * m * d) + sizes["vocab_size"] * m
    floor = 1 + count * RANK * d / weights
    return common.row(
        work,
        "unedited model",
        ours,
        theirs,
        floor_seconds=statistics.median(theirs) * floor,
        checked=checked,
        dtype=torch.bfloat16,
        shape=f"llama {sizes['num_hidden_layers']} layers {m}x{d}, {count} hooks of rank {RANK}",
        timing=timing,
        cost=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        floor_cost=floor,
        tokens=batch,
        rank=RANK,
        hooks=count,
    )
