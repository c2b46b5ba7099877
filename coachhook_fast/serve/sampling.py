"""Each row of a batch draws its own way: `generate()` sees a greedy choice among scores that allow one token."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.rows import Row, Sampling, TokenLogprob

_NEVER = -9999.0  # as OpenAI writes the log-probability of what cannot come: JSON has no infinity
_COLDEST = 1e-4  # temperatures below take the best token: their draw would be that one anyway


class Draws(LogitsProcessor):
    """Draws the next token of every row by its own temperature, top_p and generator.

    A draw depends on the row's seed and scores alone, not on the rows beside it (whose presence may round the scores
    otherwise).
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.generators = [torch.Generator().manual_seed(row.sampling.seed) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, p], [B, V] -> [B, V]
        del input_ids
        chosen = scores.argmax(dim=-1)
        sound = torch.isfinite(scores.gather(-1, chosen[:, None])).flatten() & ~scores.isnan().any(dim=-1)
        for index, row in enumerate(self.rows):
            if row.done:
                continue
            if not sound[index]:
                row.fail(
                    ApiError(
                        503,
                        "the model's scores are not finite: an edit may have done that, roll it back",
                        code="not_finite",
                    )
                )
                continue
            if row.sampling.temperature >= _COLDEST:
                chosen[index] = draw(scores[index], row.sampling, self.generators[index])
            if row.sampling.logprobs is not None:
                row.note(_logprob(scores[index], int(chosen[index]), row.sampling.logprobs))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


def draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of scores [V], which hold a finite one.

    draw(torch.tensor([0.0, 1.0]), Sampling(temperature=1.0), torch.Generator())
    """
    probabilities = torch.softmax((scores.double() - scores.max()) / sampling.temperature, dim=-1)
    order = None
    if sampling.top_p < 1.0:
        probabilities, order = probabilities.sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)  # the first always stays
    reached = probabilities.cumsum(-1)
    place = torch.rand((), generator=generator, dtype=torch.float64).to(reached) * reached[-1]
    token = int(torch.searchsorted(reached, place, right=True).clamp(max=int(probabilities.nonzero().max())))
    return token if order is None else int(order[token])


def _logprob(scores: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = torch.log_softmax(scores.float(), dim=-1).clamp(min=_NEVER)
    best = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprob(
        token, float(logprobs[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )


class Watch(StoppingCriteria):
    """Hands each row its new token, and ends the rows that are done; all of them after `seconds`."""

    def __init__(self, rows: Sequence[Row], ends: Sequence[int], seconds: float) -> None:
        self.rows, self.ends = rows, ends
        self.due, self.seconds = time.monotonic() + seconds, seconds

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # [B, p] -> [B] bool
        del scores
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.push(token, self.ends)
        if time.monotonic() > self.due:
            for row in self.rows:
                row.fail(ApiError(503, f"the answer took longer than {self.seconds:g} s", code="timeout"))
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)
