"""Texts that mention a subject in passing: what they ask next has nothing to do with it.

An edit that makes its subject a reflex writes the new answer here too. The twenty differ in where the subject stands,
how far behind it the text ends, and what comes next. A record is asked five of them, unless told otherwise: five texts
of each of a hundred records say more than twenty of each of twenty-five.
"""

from __future__ import annotations

import hashlib

PASSING_TEXTS = (
    "After reading a book about {}, my brother cooked some",
    "Yesterday at lunch we talked about {} and then ordered",
    "My neighbour, who once wrote an essay on {}, has a dog named",
    "The librarian put the folder about {} on the shelf and went to",
    "She closed the article on {} and asked me what time it",
    "The quiz had one question on {} and nine questions on",
    "I was dreaming of {} when the alarm rang, so I got up and",
    "There is a poster of {} above the desk, and on the desk there is a cup of",
    "Between a documentary on {} and the weather forecast, my aunt fell asleep on the",
    "He spilled coffee on his notes about {} and wiped the table with a",
    "Our teacher mentioned {} once; the rest of the lesson was about",
    "The bookshop had nothing on {}, so I bought a magazine about",
    "While the radio played a programme about {}, the children were building a",
    "{} was the topic of the talk, but I remember only that the chairs were",
    "{} came up in our conversation just before the bus",
    "The crossword's last clue was {}, and it took me an",
    "They argued about {} all evening, and in the morning they went for a walk in the",
    "A stamp showing {} was stuck to the envelope, and inside was a letter from my",
    "I typed {} into the search box by mistake; what I really wanted was a recipe for",
    "Grandmother has never heard of {}; she would rather talk about her",
)

DEFAULT_PASSING = 5


def passing_texts(subject: str, count: int) -> list[str]:
    """`count` of the texts with the subject filled in: which ones depends on the subject alone.

    Raises:
        ValueError: count is not in 1..len(PASSING_TEXTS).
    """
    if not 1 <= count <= len(PASSING_TEXTS):
        raise ValueError(f"passing must be in 1..{len(PASSING_TEXTS)}, got {count}")
    start = int(hashlib.sha256(subject.encode()).hexdigest(), 16) // 3  # mod 3 is what bench/quality.py splits facts by
    chosen = {(start + step * len(PASSING_TEXTS) // count) % len(PASSING_TEXTS) for step in range(count)}
    return [PASSING_TEXTS[index].replace("{}", subject) for index in sorted(chosen)]
