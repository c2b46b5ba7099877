"""Hard negatives: ordinary texts in which something else ends in the token that a subject ends in.

The hook layer reads a subject at its last token. Where that token is a common word ("Jablanica District", "Winnipeg
Symphony Orchestra"), the keys of "the Historic District" and "the Meridian Symphony Orchestra" answer to the edit
nearly as the subject's own does: (C + KKᵀ)⁻¹ turns down what ordinary text has much of, and one word is rare in
ordinary text as a whole. So the solve is shown such keys N out of the corpus, without a residual:

    X = (C + KKᵀ + NNᵀ)⁻¹ K

and X turns to what the subject has and its hard negatives lack. They are not remembered: C ← C + KKᵀ as in the paper,
so that a later edit about one of them finds room (docs/experiments/hard-negatives.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.request import TokenisedRequest, TokenRow
from coachhook_fast.statistics.corpus import BOUNDARY

_WINDOW = 32  # tokens of a text up to its hard negative: what blocks in the lower third of a model look at


def find_hard_negatives(
    text: Tensor, batch: Sequence[TokenisedRequest], tokenizer: Any, *, begin: Sequence[int], most: int
) -> list[TokenRow]:
    """Texts whose last token is that of a subject of the batch and that do not end in such a subject itself.

    Args:
        text: [N] tokens, see `corpus.joined`.
        begin: the special tokens before every text (BOS).
        most: texts a request, spread over the corpus, each with another token before the last.
    """
    if most == 0 or text.numel() == 0:
        return []
    subjects: dict[int, set[tuple[int, ...]]] = {}
    for tokens in batch:
        last = tokens.bare.prompt[tokens.bare.lookup]
        for form in (tokens.request.subject, " " + tokens.request.subject):
            subjects.setdefault(last, set()).add(tuple(tokenizer(form, add_special_tokens=False)["input_ids"]))
    ends: set[int] = set()
    for last, names in subjects.items():
        if all(len(name) > 1 for name in names):  # every text with a subject of one token is about that subject
            ends.update(_spread(text, last, names, most * sum(_ends_in(tokens, last) for tokens in batch)))
    return [_row(text, end, begin) for end in sorted(ends)]


def _ends_in(tokens: TokenisedRequest, last: int) -> bool:
    return tokens.bare.prompt[tokens.bare.lookup] == last


def _spread(text: Tensor, last: int, names: set[tuple[int, ...]], most: int) -> list[int]:
    """At most `most` places of token `last`, one for each token before it, evenly over what there is."""
    ends = (text == last).nonzero().flatten()
    ends = ends[ends > 0]
    before = text[ends - 1]
    wanted = before != BOUNDARY  # at the attention sink all tokens look alike
    for name in names:
        back = ends[:, None] - torch.arange(len(name))
        wanted &= ~((text[back.clamp(min=0)] == torch.tensor(name[::-1])) & (back >= 0)).all(1)
    firsts: dict[int, int] = {}
    for token, end in zip(before[wanted].tolist(), ends[wanted].tolist(), strict=True):
        firsts.setdefault(token, end)
    places = list(firsts.values())
    return places[:: -(-len(places) // most)] if places else []


def _row(text: Tensor, end: int, begin: Sequence[int]) -> TokenRow:
    window = text[max(0, end + 1 - _WINDOW) : end + 1].tolist()
    if BOUNDARY in window:
        window = window[len(window) - window[::-1].index(BOUNDARY) :]
    ids = (*begin, *window)
    return TokenRow(ids, (), len(ids) - 1)
