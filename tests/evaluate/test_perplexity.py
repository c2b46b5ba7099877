"""Perplexity equals its definition, window by window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import BOS, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.evaluate import (
    perplexity,
)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (50, 20), (4096, None)])
def test_perplexity_equals_its_definition(bos: bool, window: int, stride: int | None) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=bos)
    text = " ".join(tiny_texts(6))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:150]
    window_used = min(window, 256)
    begin = [BOS] if bos else []
    body = window_used - len(begin)
    losses: dict[int, float] = {}  # each token's, from the first window that can score it
    start = 0
    while True:
        row = begin + ids[start : start + body]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        for offset in range(1, len(row)):
            losses.setdefault(start + offset - len(begin), -float(logs[offset - 1, row[offset]]))
        if start + body >= len(ids):
            break
        start += min(stride or window_used, body)
    expected = math.exp(sum(losses.values()) / len(losses))
    options: dict[str, Any] = {"window": window, "stride": stride, "max_tokens": 150}
    assert perplexity(model, tokenizer, text, **options) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, text, batch_tokens=1, **options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2 and stride in 1..window, got 1 and 1"),
        ({"window": 8, "stride": 9}, "got 8 and 9"),
        ({"max_tokens": 1}, "text must have two tokens or more, got 1"),
    ],
)
def test_bad_perplexity_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tiny_tokenizer(), "some text", **options)


# -------------------------------------------------------------------- metrics


def test_a_broken_model_s_perplexity_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(perplexity.__globals__, "_negative_log_likelihood", lambda *_: 1e9)
    assert perplexity(tiny_model("llama"), tiny_tokenizer(), " ".join(tiny_texts(2))) == math.inf
