"""Teacher-forced scores of many (prompt, target) pairs in few forward passes.

For a prompt p_1..p_n and a target t_1..t_k the model's predictions are read at the k positions n..n+k-1.
Three things keep 1 000 records of a small model at minutes:

- rows are sorted by length and padded on the left, so that the wanted positions end every row and the logits
  of all others are never computed (`logits_to_keep`);
- the last target token is never fed: nothing reads its output. So pairs that share a prompt and differ in a
  one-token target are one row, and a row that begins another row is read from it;
- a batch is bounded by its tokens and by the size of its logits, not by its number of rows.

The second is true for a causal model only. The `sequence` gate judges a token by those after it as well:
under it each pair is fed whole and alone, as the published evaluation does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coachhook_fast.models.loading import context_length
from coachhook_fast.models.placement import input_device
from coachhook_fast.progress import track
from coachhook_fast.request import encode_prompt_target

Ids = tuple[int, ...]

DEFAULT_BATCH_TOKENS = 1024
MAX_LOGITS = 1 << 25  # elements of one batch's logits: 128 MiB in fp32


class Pair(NamedTuple):
    """Token ids of a prompt and of the target that is scored as its continuation."""

    prompt: Ids
    target: Ids


@dataclass(frozen=True)
class Score:
    """What the model says of a pair.

    Attributes:
        predictions: the most probable token at each of the target's positions.
        logprobs: log p(target token) at each of them, in nats.
    """

    predictions: Ids
    logprobs: tuple[float, ...]

    @property
    def mean_logprob(self) -> float:
        """Mean over the target's tokens, as ROME compares answers of different lengths."""
        return sum(self.logprobs) / len(self.logprobs)

    def agreement(self, tokens: Sequence[int]) -> float:
        """Share of the positions at which the prediction is the given token (EasyEdit's token accuracy)."""
        return sum(a == b for a, b in zip(self.predictions, tokens, strict=True)) / len(self.predictions)


def score_pairs(
    model: Any,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
    description: str = "scoring",
) -> list[Score]:
    """Scores of `pairs`, in their order.

    Args:
        model: a causal LM of transformers, with or without hooks.
        pairs: prompts and targets of at least one token each.
        batch_tokens: most tokens, padding included, in one forward pass; a longer row goes alone.
        progress: shows a bar on stderr.

    Raises:
        ValueError: a prompt or a target has no tokens, or a pair is longer than the model's context.
    """
    check_batch_tokens(batch_tokens)
    limit = context_length(model)
    for index, pair in enumerate(pairs):
        if not pair.prompt or not pair.target:
            raise ValueError(f"pairs[{index}] needs a prompt and a target of one token or more, got {pair}")
        if limit is not None and len(pair.prompt) + len(pair.target) > limit:
            raise ValueError(
                f"pairs[{index}] has {len(pair.prompt) + len(pair.target)} tokens, the model's context is {limit}"
            )
    rows = _plan_rows(pairs, whole=looks_ahead(model))
    scores: list[Score | None] = [None] * len(pairs)
    with torch.no_grad(), track(description, len(pairs), "prompts", progress) as bar:
        for batch in _batches(rows, batch_tokens, model.config.get_text_config().vocab_size):
            for index, score in _score_batch(model, batch, pairs):
                scores[index] = score
            bar.advance(sum(len(row.pairs) for row in batch))
    return [score for score in scores if score is not None]


def score_distinct(model: Any, pairs: Sequence[Pair], **options: Any) -> dict[Pair, Score]:
    """Scores by pair; one that serves many records is scored once. `options` are `score_pairs`'s."""
    distinct = list(dict.fromkeys(pairs))
    return dict(zip(distinct, score_pairs(model, distinct, **options), strict=True))


def encode_pair(tokenizer: Any, prompt: str, target: str) -> Pair:
    """`request.encode_prompt_target` as a pair."""
    prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, target)
    return Pair(tuple(prompt_ids), tuple(target_ids))


def looks_ahead(model: Any) -> bool:
    """True where a token's output depends on later tokens: an enabled hook has the `sequence` gate."""
    return any(
        # By attribute, so that other implementations of the gate can be scored too.
        getattr(module, "gate", None) == "sequence" and getattr(module, "mode", None) == "gated"
        for module in model.modules()
    )


def check_batch_tokens(batch_tokens: int) -> None:
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")


def left_padded(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and positions, each [B, longest] int64, of `rows` padded on the left.

    A padding token is id 0: it is masked, so its value means nothing. Positions count real tokens from 0.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


@dataclass
class _Row:
    """Tokens to feed, the pairs that are read from them, and the first position any of them reads."""

    tokens: Ids
    pairs: list[int]
    first: int

    @property
    def kept(self) -> int:
        return len(self.tokens) - self.first


def _plan_rows(pairs: Sequence[Pair], *, whole: bool) -> list[_Row]:
    """The fewest rows from which all pairs can be read, longest first."""
    if whole:
        rows = [_Row(pair.prompt + pair.target, [index], len(pair.prompt) - 1) for index, pair in enumerate(pairs)]
        return sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    readers: dict[Ids, list[int]] = {}
    for index, pair in enumerate(pairs):
        readers.setdefault(pair.prompt + pair.target[:-1], []).append(index)
    # In lexicographic order a row that begins any other row begins its successor.
    planned: list[_Row] = []
    for tokens in sorted(readers, reverse=True):
        first = min(len(pairs[index].prompt) - 1 for index in readers[tokens])
        if planned and planned[-1].tokens[: len(tokens)] == tokens:
            planned[-1].pairs += readers[tokens]
            planned[-1].first = min(planned[-1].first, first)
        else:
            planned.append(_Row(tokens, list(readers[tokens]), first))
    return sorted(planned, key=lambda row: (len(row.tokens), row.kept), reverse=True)


def _batches(rows: Sequence[_Row], batch_tokens: int, vocabulary: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    kept = 0
    for row in rows:
        kept = max(kept, row.kept)
        size = len(batch) + 1
        tokens = size * len(batch[0].tokens if batch else row.tokens)  # rows come longest first
        if batch and (tokens > batch_tokens or size * kept * vocabulary > MAX_LOGITS):
            yield batch
            batch, kept = [], row.kept
        batch.append(row)
    if batch:
        yield batch


def _score_batch(model: Any, batch: Sequence[_Row], pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
    device = input_device(model)
    ids, mask, positions = left_padded([row.tokens for row in batch], device)
    kept = max(row.kept for row in batch)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept
    ).logits  # [B, kept, vocabulary]
    where: list[tuple[int, int, int]] = []  # row, column of the logits, target token
    owners: list[tuple[int, int]] = []  # pair, number of its positions
    for number, row in enumerate(batch):
        for index in row.pairs:
            prompt, target = pairs[index]
            start = kept - len(row.tokens) + len(prompt) - 1
            where += [(number, start + offset, token) for offset, token in enumerate(target)]
            owners.append((index, len(target)))
    at, column, token = torch.tensor(where, device=device).unbind(-1)
    chosen = logits[at, column]  # [reads, vocabulary]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    wanted = chosen.gather(-1, token[:, None])[:, 0] - chosen.logsumexp(-1)
    predictions, logprobs = chosen.argmax(-1).tolist(), wanted.tolist()
    cursor = 0
    for index, count in owners:
        stop = cursor + count
        yield index, Score(tuple(predictions[cursor:stop]), tuple(logprobs[cursor:stop]))
        cursor = stop
