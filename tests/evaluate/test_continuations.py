"""What the model writes: batched generation equals single, and fluency."""

from __future__ import annotations

import math

import pytest
from evaluate_cases import FAMILIES, install_hooks, plain_greedy, random_pairs
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.evaluate import (
    complete,
    fluency,
    generation,
)
from coachhook_fast.evaluate.generation import continue_greedily, ngram_entropy


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_equals_single(family: str, hooked: bool) -> None:
    model = tiny_model(family)
    if hooked:
        install_hooks(model, "calibrated")
    prompts = [pair.prompt for pair in random_pairs(8)]
    lengths = [1 + index % 5 for index in range(8)]
    written = continue_greedily(model, prompts, lengths, batch_tokens=60)
    assert written == [plain_greedy(model, *one) for one in zip(prompts, lengths, strict=True)]


def test_generation_ignores_the_models_own_sampling_settings() -> None:
    model = tiny_model("llama")
    prompts = [pair.prompt for pair in random_pairs(3)]
    plain = continue_greedily(model, prompts, [12] * 3)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert continue_greedily(model, prompts, [12] * 3) == plain


def test_bad_generation_arguments() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        continue_greedily(model, [(1,)], [1, 1])
    with pytest.raises(ValueError, match=r"prompts\[0\] needs a token and a length >= 1, got \(1,\) and 0"):
        continue_greedily(model, [(1,)], [0])


def test_complete_returns_text() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (text,) = complete(model, tokenizer, ["Ada Vale works as a"], max_new_tokens=4)
    ids = tuple(tokenizer("Ada Vale works as a")["input_ids"])
    assert text == tokenizer.decode(plain_greedy(model, ids, 4), skip_special_tokens=True)


def test_ngram_entropy_by_hand() -> None:
    # a b a b: bigrams ab ba ab -> H = .918; trigrams aba bab -> H = 1
    bigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    assert ngram_entropy("the the the the the") == 0
    assert ngram_entropy("") == 0
    assert ngram_entropy("word") == 0


def test_fluency_does_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = tiny_texts(4)
    together = fluency(model, tokenizer, prompts, max_new_tokens=20)
    assert fluency(model, tokenizer, prompts, max_new_tokens=20, batch_tokens=1) == together
    assert fluency(model, tokenizer, prompts, max_new_tokens=20, seed=1) != together
    assert all(value > 0 for value in together)


# -------------------------------------------------------------------- perplexity


def test_a_text_does_not_wait_for_a_much_longer_one() -> None:
    """A batch writes as many tokens as its longest text wants."""
    lengths = [24, 64, 3, 24, 64, 2]
    prompts = [(5, 6, 7)] * len(lengths)
    batches = [[lengths[index] for index in batch] for batch in generation._batches(prompts, lengths, 10_000, 100)]
    assert batches == [[64, 64], [24, 24], [3, 2]]
    assert [len(batch) for batch in generation._batches(prompts[:4], [24] * 4, 10_000, 3)] == [3, 1]
