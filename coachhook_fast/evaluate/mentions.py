"""Which texts name a subject, and how often a text names an answer: as whole words."""

from __future__ import annotations

import re
from collections.abc import Collection


def names_any(text: str, subjects: Collection[str]) -> bool:
    """Whether `text` holds one of `subjects` (a set, for speed) as whole words, in the same case."""
    if not subjects:
        return False
    longest = max(map(len, subjects))
    starts = [i for i in range(len(text)) if i == 0 or not _in_word(text[i - 1])]
    ends = [i for i in range(1, len(text) + 1) if i == len(text) or not _in_word(text[i])]
    return any(text[start:end] in subjects for start in starts for end in ends if 0 < end - start <= longest)


def mentions(text: str, answer: str) -> int:
    """How often `text` says `answer`: as whole words, in any case, whatever the white space between them."""
    words = [re.escape(word) for word in answer.casefold().split()]
    if not words:
        return 0
    return len(re.findall(r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)", text.casefold()))


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
