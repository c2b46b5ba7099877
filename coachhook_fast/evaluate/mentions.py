"""Which texts name an edited subject: what a correct edit changes there is no harm done to a neighbour."""

from __future__ import annotations

from collections.abc import Collection


def names_any(text: str, subjects: Collection[str]) -> bool:
    """Whether `text` holds one of `subjects` (a set, for speed) as whole words, in the same case."""
    if not subjects:
        return False
    longest = max(map(len, subjects))
    starts = [i for i in range(len(text)) if i == 0 or not _in_word(text[i - 1])]
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or not _in_word(text[i])]
    return any(text[start:end] in subjects for start in starts for end in ends if 0 < end - start <= longest)


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
