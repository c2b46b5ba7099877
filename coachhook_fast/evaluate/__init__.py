"""How good a set of edits is: docs/evaluation.md defines every metric."""

from __future__ import annotations

from coachhook_fast.evaluate.base import BaseAnswers
from coachhook_fast.evaluate.datasets import read_records
from coachhook_fast.evaluate.generation import complete, fluency
from coachhook_fast.evaluate.metrics import DEFAULT_METRICS, METRICS, HeldOut, evaluate
from coachhook_fast.evaluate.perplexity import perplexity
from coachhook_fast.evaluate.record import Consequence, EditRecord, Fact
from coachhook_fast.evaluate.result import Evaluation, RecordResult
from coachhook_fast.evaluate.scoring import Pair, Score, score_pairs

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "BaseAnswers",
    "Consequence",
    "EditRecord",
    "Evaluation",
    "Fact",
    "HeldOut",
    "Pair",
    "RecordResult",
    "Score",
    "complete",
    "evaluate",
    "fluency",
    "perplexity",
    "read_records",
    "score_pairs",
]
