"""Perplexity on a held-out text, in windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, Ids, check_batch_tokens
from coachhook_fast.models.loading import context_length
from coachhook_fast.models.placement import input_device
from coachhook_fast.progress import track
from coachhook_fast.statistics.corpus import begin_tokens

_ROWS = 256  # positions whose log-probabilities are in memory at once


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> float:
    """exp of the mean negative log-likelihood of the text's tokens.

    The text is cut into windows of `window` tokens, each begun as the tokenizer begins a text (BOS where it
    adds one). Each window starts `stride` tokens after the one before and scores only tokens that none before
    has scored; the rest is context. With `stride` None windows do not overlap: half the work of `stride =
    window / 2`, and a slightly higher figure, since the first tokens of a window have little context. A token
    with nothing before it is not scored.

    Args:
        text: the held-out text.
        window: tokens a window, capped by the model's context.
        stride: tokens between the beginnings of two windows, at most `window`; None means `window`.
        max_tokens: use only the text's first tokens.
        batch_tokens: most tokens in one forward pass; a longer window goes alone.

    Raises:
        ValueError: window is below 2, stride is not in 1..window, or the text has fewer than two tokens.
    """
    check_batch_tokens(batch_tokens)
    limit = context_length(model)
    window = window if limit is None else min(window, limit)
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window must be at least 2 and stride in 1..window, got {window} and {stride}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"text must have two tokens or more, got {len(ids)}")
    rows = list(_windows(tuple(ids), tuple(begin_tokens(tokenizer)), window, stride))
    device = input_device(model)
    size = max(1, batch_tokens // window)
    total, count = 0.0, 0
    with torch.no_grad(), track("perplexity", len(ids), "tokens", progress) as bar:
        for batch in _equal_lengths(rows, size):
            tokens = torch.tensor([row for row, _ in batch], device=device)
            scored = batch[0][1]
            loss = _negative_log_likelihood(model, tokens, scored)
            total, count = total + loss, count + scored * len(batch)
            bar.advance(scored * len(batch))
    try:
        return math.exp(total / count)
    except OverflowError:  # a broken model's, beyond the largest number
        return math.inf


def _windows(ids: Ids, prefix: Ids, window: int, stride: int) -> Iterator[tuple[Ids, int]]:
    """(tokens, number of last tokens to score) of each window."""
    body = window - len(prefix)
    step = min(stride, body)
    done = 0 if prefix else 1  # tokens scored, or that never will be
    for start in range(0, len(ids), step):
        stop = min(start + body, len(ids))
        # A window without overlap or prefix cannot score its own first token: nothing stands before it.
        scored = min(stop - done, len(prefix) + stop - start - 1)
        if scored > 0:
            yield prefix + ids[start:stop], scored
        done = stop
        if stop == len(ids):
            return


def _equal_lengths(rows: list[tuple[Ids, int]], size: int) -> Iterator[list[tuple[Ids, int]]]:
    """Batches of windows of one length with one number of scored tokens, so that nothing is padded."""
    batch: list[tuple[Ids, int]] = []
    for row in rows:
        if batch and (len(batch) == size or (len(row[0]), row[1]) != (len(batch[0][0]), batch[0][1])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _negative_log_likelihood(model: Any, tokens: Tensor, scored: int) -> float:
    """Sum over the last `scored` tokens of each row of `tokens` [B, n], in nats."""
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=scored + 1).logits[:, :-1]
    labels = tokens[:, -scored:].flatten()
    total = 0.0
    for part, label in zip(logits.flatten(0, 1).split(_ROWS), labels.split(_ROWS), strict=True):
        precise = part.to(torch.promote_types(part.dtype, torch.float32))
        total += float(F.cross_entropy(precise, label, reduction="sum"))
    return total
