"""What the evaluation's tests share: random pairs, hooks that gate some tokens, one text scored or written plainly."""

from __future__ import annotations

from typing import Any

import torch

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.evaluate import (
    Pair,
)
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.models.architectures import layout_of

FAMILIES = ("gpt2", "llama", "gemma3", "phi3")


def random_pairs(n: int, *, seed: int = 0) -> list[Pair]:
    """Pairs of 3 to 20 prompt tokens and 1 to 4 target tokens; every other one repeats the prompt before."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(3, 320, (length,), generator=generator).tolist())

    pairs: list[Pair] = []
    for index in range(n):
        prompt = pairs[-1].prompt if index % 2 else ids(3, 20)
        pairs.append(Pair(prompt, ids(1, 4)))
    return pairs


def install_hooks(model: Any, gate: str) -> Hooks:
    """Random rank-2 edits in two layers, with thresholds that some tokens pass and some do not."""
    layout = layout_of(model)
    handle = Hooks(model, layout, (1, 2), gate)
    torch.manual_seed(5)
    for hook in handle.hooks:
        update = torch.randn(hook.out_features, 2), torch.randn(hook.in_features, 2) / hook.in_features**0.5
        delta = LowRankDelta.zeros(hook.out_features, hook.in_features).append(*update)
        hook.set_delta(delta, 1.0 if gate == "sequence" else 1.5)
    return handle


def plain_scores(model: Any, pair: Pair, *, whole: bool = False) -> tuple[list[int], list[float]]:
    """One pair, one unpadded pass, all logits. Feeding the last token matters to the `sequence` gate only."""
    row = pair.prompt + (pair.target if whole else pair.target[:-1])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    at = range(len(pair.prompt) - 1, len(pair.prompt) + len(pair.target) - 1)
    return [int(logits[p].argmax()) for p in at], [float(logits[p, t]) for p, t in zip(at, pair.target, strict=True)]


def plain_greedy(model: Any, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """No cache, no padding; ends before EOS."""
    row = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        row.append(token)
    return tuple(row[len(prompt) :])
