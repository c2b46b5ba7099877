"""What an edit does to the rest of its subject: texts about it that do not ask for the fact.

Reliability, generality and locality do not see it: an edit that makes its subject talk of nothing but the new answer
scores full marks. ROME calls this essence drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.evaluate.base import unedited
from coachhook_fast.evaluate.record import EditRecord
from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, left_padded
from coachhook_fast.models.placement import input_device
from coachhook_fast.progress import track
from coachhook_fast.request import prompt_ids

DRIFT_PROMPTS = (
    "{} is a",
    "Yesterday, {} was",
    "The first thing to know about {} is that",
    "I saw a picture of {} and",
    "{} has two",
)


def drift(
    model: Any,
    tokenizer: Any,
    records: Sequence[EditRecord],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> list[float]:
    """For each record KL(base ‖ model) of the next token in nats, mean over DRIFT_PROMPTS about its subject."""
    texts = [text.replace("{}", record.request.subject) for record in records for text in DRIFT_PROMPTS]
    rows = [tuple(prompt_ids(tokenizer, text)) for text in texts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found = torch.empty(len(rows), dtype=torch.float64)
    with torch.no_grad(), track("drift", len(rows), "texts", progress) as bar:
        for batch in _batches(order, rows, batch_tokens):
            ids, mask, positions = left_padded([rows[index] for index in batch], input_device(model))

            def log_p(ids: Tensor = ids, mask: Tensor = mask, positions: Tensor = positions) -> Tensor:
                logits = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
                ).logits[:, -1]
                return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

            after = log_p()
            with unedited(model):
                before = log_p()
            found[batch] = (before.exp() * (before - after)).sum(-1).to(found).cpu()
            bar.advance(len(batch))
    return found.view(len(records), len(DRIFT_PROMPTS)).mean(1).tolist()


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:  # shortest first: the last row of a batch is its longest
        if batch and (len(batch) + 1) * len(rows[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch
