"""Prompts that no edit of a ledger is about, made from the ledger alone: what the gate keeps as it was."""

from __future__ import annotations

from collections.abc import Sequence

from coachhook_fast.evaluate.passing import passing_texts
from coachhook_fast.request import EditRequest, filled

_EACH = 2  # neighbours, and texts in passing, a fact
_MOST = 250  # facts: 1 000 prompts show a change of one in a hundred
# Names that a prompt about a person, a place, a firm or a work takes; made up, so that hardly a ledger has them.
_STAND_INS = (
    "Anna Keldermans", "Port Averby", "Halvorsen & Pike", "The Glass Orchard", "Samuel Ntaba", "Lake Torvin",
    "Meridian Looms", "Daughters of the Mill", "Ricardo Vasquelle", "Upper Sandholm", "the Orsova 12",
)  # fmt: skip


def other_prompts(requests: Sequence[EditRequest]) -> list[str]:
    """Of each fact: its question about two subjects that nobody edits (neighbours), two texts that mention its subject
    in passing, and what its request asked to keep. Of more than 250 facts at most as many are taken, evenly.

    Examples:
        >>> other_prompts([EditRequest("{} works as a", "Ada Vale", "pilot")])[0]
        'Anna Keldermans works as a'
    """
    subjects = {request.subject for request in requests}
    strangers = [name for name in _STAND_INS if name not in subjects]
    step = -(-len(requests) // _MOST) or 1
    texts: list[str] = []
    for number, request in enumerate(requests[::step]):
        names = [strangers[(_EACH * number + i) % len(strangers)] for i in range(_EACH)] if strangers else []
        texts += [filled(request.template, name) for name in names]
        texts += passing_texts(request.subject, _EACH)
        texts += [filled(text, request.subject) for text in request.keep]
    asked = {filled(text, request.subject) for request in requests for text in (request.prompt, *request.paraphrases)}
    return [text for text in dict.fromkeys(texts) if text not in asked]
