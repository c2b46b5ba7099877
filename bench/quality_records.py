"""Which facts a quality run edits, in which order, and what of a record goes into the request."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coachhook_fast.evaluate import EditRecord

HALVES = {"A": 1, "B": 2}  # sha256 of the subject, mod 3: settings are chosen on A and reported on B


def choose(
    records: Sequence[EditRecord],
    *,
    half: str = "all",
    form: str = "all",
    strict: bool = False,
    seed: int | None = None,
) -> list[EditRecord]:
    """The records of a half and form, `strict` those with two or more paraphrases and facts of the same subject; in the
    file's order or, with `seed`, in a random one."""
    chosen = [
        record
        for record in records
        if (half == "all" or part(record) == HALVES[half])
        and form in ("all", record.form)
        and (not strict or min(len(record.paraphrases), len(record.same_subject)) >= 2)
    ]
    if seed is not None:
        random.Random(seed).shuffle(chosen)
    return chosen


def part(record: EditRecord) -> int:
    return int(hashlib.sha256(record.request.subject.encode()).hexdigest(), 16) % 3


def give(record: EditRecord, count: int) -> EditRecord:
    """The record with its first `count` paraphrases in the request; these are not scored."""
    request = replace(record.request, paraphrases=record.request.paraphrases + record.paraphrases[:count])
    return replace(record, request=request, paraphrases=record.paraphrases[count:])


def facts_key(records: Sequence[EditRecord]) -> list[Any]:
    """What methods are told of each record."""
    requests = [record.request for record in records]
    more = [[one.paraphrases, one.keep] if one.paraphrases or one.keep else [] for one in requests]
    return [(one.text, one.subject, one.target_new, *rest) for one, rest in zip(requests, more, strict=True)]
