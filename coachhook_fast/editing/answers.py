"""What an edited model says where a target was wished, read in one pass a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coachhook_fast.models.passes.forward import PartialModel, align_rows
from coachhook_fast.request import TokenisedRequest, TokenRow


@dataclass(frozen=True)
class Answer:
    """The model's greedy continuation of a prompt, as far as its target tells.

    Attributes:
        tokens: greedy tokens up to the first that is not the target's, and that one; the whole target where it is said.
        is_target: whether the greedy continuation is the target, token by token.
    """

    tokens: tuple[int, ...]
    is_target: bool


@torch.no_grad()
def answers_to(partial: PartialModel, rows: Sequence[TokenRow], *, pad_id: int, max_tokens: int) -> list[Answer]:
    """The answers to `rows`, with the hooks as they are.

    With the target fed, the model's best token at each place is the greedy one as long as all before it were the
    target's: so one pass tells what as many passes as there are tokens would.
    """
    answers: list[Answer] = []
    start = 0
    while start < len(rows):
        stop, longest = start + 1, _length(rows[start])
        while stop < len(rows) and (stop + 1 - start) * max(longest, _length(rows[stop])) <= max_tokens:
            longest = max(longest, _length(rows[stop]))
            stop += 1
        answers += _of_chunk(partial, rows[start:stop], pad_id)
        start = stop
    return answers


def answers_of(
    partial: PartialModel, batch: Sequence[TokenisedRequest], *, pad_id: int, max_tokens: int
) -> list[tuple[Answer, ...]]:
    """Of each request: the answers to its bare prompt and then to its paraphrases; see `answers_to`."""
    rows = [row for tokens in batch for row in (tokens.bare, *tokens.paraphrases)]
    answers = iter(answers_to(partial, rows, pad_id=pad_id, max_tokens=max_tokens))
    return [tuple(next(answers) for _ in (tokens.bare, *tokens.paraphrases)) for tokens in batch]


def _length(row: TokenRow) -> int:
    return len(row.prompt) + len(row.target)


def _of_chunk(partial: PartialModel, rows: Sequence[TokenRow], pad_id: int) -> list[Answer]:
    texts = [[*row.prompt, *row.target[:-1]] for row in rows]
    ends = [len(row.prompt) - 1 for row in rows]
    tokens = align_rows(texts, ends, pad_id, partial.device)
    places = [(number, tokens.lookup + i) for number, row in enumerate(rows) for i in range(len(row.target))]
    at, columns = torch.tensor(places, device=partial.device).unbind(1)
    with partial.gathered_logits(at, columns):
        result, _ = partial.run(tokens.columns(0))
    best = iter(result.logits[0].argmax(-1).tolist())
    answers = []
    for row in rows:
        said = [next(best) for _ in row.target]
        wrong = next((i for i, (a, b) in enumerate(zip(said, row.target, strict=True)) if a != b), None)
        answers.append(Answer(tuple(said if wrong is None else said[: wrong + 1]), wrong is None))
    return answers
