"""Teacher-forced scores: batched equals single, sharing rows changes nothing."""

from __future__ import annotations

import pytest
from evaluate_cases import FAMILIES, install_hooks, plain_scores, random_pairs
from tiny import tiny_model

from coachhook_fast.evaluate import (
    Pair,
    score_pairs,
)
from coachhook_fast.evaluate.scoring import _plan_rows


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_single(family: str, batch_tokens: int) -> None:
    model = tiny_model(family)
    pairs = random_pairs(12)
    for pair, score in zip(pairs, score_pairs(model, pairs, batch_tokens=batch_tokens), strict=True):
        predictions, logprobs = plain_scores(model, pair)
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_batched_equals_single_under_hooks(gate: str) -> None:
    model = tiny_model("llama")
    base = score_pairs(model, random_pairs(12))
    install_hooks(model, gate)
    scores = score_pairs(model, random_pairs(12), batch_tokens=96)
    assert scores != base
    for pair, score in zip(random_pairs(12), scores, strict=True):
        predictions, logprobs = plain_scores(model, pair, whole=gate == "sequence")
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_a_row_serves_every_pair_that_begins_it() -> None:
    pairs = [
        Pair((5, 6), (7,)),  # fed: 5 6
        Pair((5, 6), (8,)),  # fed: 5 6
        Pair((5, 6), (7, 8, 9)),  # fed: 5 6 7 8
        Pair((5, 6, 7), (3,)),  # fed: 5 6 7
        Pair((5, 9), (7,)),  # fed: 5 9
    ]
    rows = _plan_rows(pairs, whole=False)
    assert [(row.tokens, sorted(row.pairs), row.first) for row in rows] == [
        ((5, 6, 7, 8), [0, 1, 2, 3], 1),
        ((5, 9), [4], 1),
    ]
    assert len(_plan_rows(pairs, whole=True)) == len(pairs)
    model = tiny_model("qwen3")
    for pair, score in zip(pairs, score_pairs(model, pairs), strict=True):
        predictions, logprobs = plain_scores(model, pair)
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_only_wanted_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    computed = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: computed.append(args[0].shape[:2]))
    pairs = [Pair(tuple(range(3, 33)), (5,)), Pair(tuple(range(40, 70)), (6, 7))]
    score_pairs(model, pairs)
    assert sum(rows * columns for rows, columns in computed) <= 4


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([Pair((), (1,))], r"pairs\[0\] needs a prompt and a target"),
        ([Pair((1,), (1,)), Pair((1,), ())], r"pairs\[1\] needs a prompt and a target"),
        ([Pair((1,) * 300, (1,))], r"pairs\[0\] has 301 tokens, the model's context is 256"),
    ],
)
def test_bad_pairs(pairs: list[Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_pairs(tiny_model("llama"), pairs)


def test_bad_batch_tokens() -> None:
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        score_pairs(tiny_model("llama"), random_pairs(1), batch_tokens=0)


# -------------------------------------------------------------------- generation
