"""What the model writes: batched continuations, their exact match, and their fluency.

All decoding goes through `model.generate` with a KV cache and left padding, as a user's would.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, MAX_LOGITS, Ids, check_batch_tokens, left_padded
from coachhook_fast.models.loading import context_length
from coachhook_fast.models.placement import input_device
from coachhook_fast.progress import track
from coachhook_fast.request import prompt_ids

FLUENCY_TOKENS = 100  # of text a prompt, as ROME
_FLUENCY_TOP_K = 5
_UNWANTED = 8  # more steps than these are worth a batch of its own
_NGRAM_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def continue_greedily(
    model: Any,
    prompts: Sequence[Ids],
    lengths: Sequence[int],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
    description: str = "generating",
    draws: SeededTopK | None = None,
) -> list[Ids]:
    """Greedy continuations: `lengths[i]` tokens after `prompts[i]`, fewer where the model ends the text.

    Args:
        model: a causal LM of transformers.
        prompts: token ids, one or more each.
        lengths: tokens to write after each prompt.
        batch_tokens: most tokens of one batch, prompt and continuation, padding included.
        draws: samples instead of taking the best token.

    Raises:
        ValueError: prompts and lengths differ in number, a prompt is empty or a length is below 1.
    """
    check_batch_tokens(batch_tokens)
    if len(prompts) != len(lengths):
        raise ValueError(f"prompts and lengths must be as many, got {len(prompts)} and {len(lengths)}")
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if not prompt or length < 1:
            raise ValueError(f"prompts[{index}] needs a token and a length >= 1, got {prompt} and {length}")
    written: list[Ids] = [()] * len(prompts)
    device = input_device(model)
    ends = end_tokens(model)
    with torch.no_grad(), track(description, len(prompts), "texts", progress) as bar:
        for batch in _batches(prompts, lengths, batch_tokens, MAX_LOGITS // model.config.get_text_config().vocab_size):
            ids, mask, _ = left_padded([prompts[index] for index in batch], device)
            longest = max(lengths[index] for index in batch)
            if draws is not None:
                draws.select(batch)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=greedy_config(longest, ends),
                logits_processor=LogitsProcessorList([] if draws is None else [draws]),
            )
            for index, row in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                written[index] = _until_end(row[: lengths[index]], ends)
            bar.advance(len(batch))
    return written


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 8) -> list[str]:
    """Greedy continuations of texts, as text: a quick look at what a model says.

    Raises:
        ValueError: a text with its continuation would be longer than the model's context.
    """
    ids = [tuple(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    longest, limit = max(map(len, ids), default=0), context_length(model)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context, {limit}"
        )
    written = continue_greedily(model, ids, [max_new_tokens] * len(ids))
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written]


def fluency(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = FLUENCY_TOKENS,
    seed: int = 0,
    batch_tokens: int = 8 * DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> list[float]:
    """ROME's fluency of a text written after each prompt: its bigrams' and trigrams' entropy in bits.

    The text is prompt and continuation, sampled among the five best tokens as ROME does. The draw depends on
    `seed` and on the prompt's index only, so neither the batch size nor the neighbours in a batch change it.
    """
    ids = [tuple(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    written = continue_greedily(
        model,
        ids,
        [max_new_tokens] * len(ids),
        batch_tokens=batch_tokens,
        progress=progress,
        description="fluency",
        draws=SeededTopK(_FLUENCY_TOP_K, seed),
    )
    texts = [tokenizer.decode(a + b, skip_special_tokens=True) for a, b in zip(ids, written, strict=True)]
    return [ngram_entropy(text) for text in texts]


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 of the bigrams' entropy and 4/3 of the trigrams', in bits; 0 for one word or none.

    Words are runs of letters and digits, other signs one by one (ROME's code splits with NLTK, which this
    package does not need otherwise; the two agree but for abbreviations and contractions).
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy(words, n) for n, weight in _NGRAM_WEIGHTS.items()) / len(_NGRAM_WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[offset:] for offset in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


class SeededTopK(LogitsProcessor):
    """Makes the greedy choice a draw among the k best tokens: adds Gumbel noise to them and bars the others.

    Each prompt has its own generator, so a draw does not depend on the batch around it.
    """

    def __init__(self, k: int, seed: int) -> None:
        self.k = k
        self.seed = seed
        self._generators: list[torch.Generator] = []

    def select(self, indices: Sequence[int]) -> None:
        """Names the prompts of the next batch."""
        self._generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + index) for index in indices]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        draws = [torch.rand(best.values.shape[-1], generator=one, dtype=torch.float64) for one in self._generators]
        noise = -torch.log(-torch.log(torch.stack(draws).clamp(1e-12, 1 - 1e-12)))
        values = best.values + noise.to(best.values)
        return torch.full_like(scores, -torch.inf).scatter(-1, best.indices, values)


def _batches(prompts: Sequence[Ids], lengths: Sequence[int], batch_tokens: int, most_rows: int) -> Iterator[list[int]]:
    """Indices of prompts that want as many tokens and are about as long."""
    order = sorted(range(len(prompts)), key=lambda index: (lengths[index], len(prompts[index])), reverse=True)
    batch: list[int] = []
    longest = 0
    for index in order:
        longest = max(longest, len(prompts[index]) + lengths[index])
        unwanted = lengths[batch[0]] - lengths[index] if batch else 0  # steps that this row would only sit through
        full = (len(batch) + 1) * longest > batch_tokens or len(batch) >= most_rows
        if batch and (full or unwanted > _UNWANTED):
            yield batch
            batch, longest = [], len(prompts[index]) + lengths[index]
        batch.append(index)
    if batch:
        yield batch


def end_tokens(model: Any) -> list[int]:
    for config in (model.generation_config, model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return []


def greedy_config(length: int, ends: list[int]) -> GenerationConfig:
    """Plain greedy decoding; every field that a model's own generation config could bend is set."""
    return GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )


def _until_end(row: Sequence[int], ends: Sequence[int]) -> Ids:
    """The row up to its first end token, exclusive."""
    for position, token in enumerate(row):
        if token in ends:
            return tuple(row[:position])
    return tuple(row)
