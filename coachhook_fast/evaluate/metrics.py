"""`evaluate`: every metric of a set of edits in as few passes as possible.

EasyEdit's reliability, generality and locality, ROME's successes by probability, what the edit does to the rest of its
subject, what the model writes, fluency and perplexity; docs/evaluation.md defines them one by one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.evaluate.answers import SCORED, AnswerPlan, score_answers
from coachhook_fast.evaluate.base import BaseAnswers, unedited
from coachhook_fast.evaluate.drift import drift
from coachhook_fast.evaluate.generation import continue_greedily, fluency
from coachhook_fast.evaluate.passing import DEFAULT_PASSING, passing_texts
from coachhook_fast.evaluate.perplexity import perplexity
from coachhook_fast.evaluate.record import EditRecord
from coachhook_fast.evaluate.result import Evaluation, RecordResult, mean
from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS
from coachhook_fast.evaluate.texts import WRITTEN, TextPlan, write_texts

METRICS = (*SCORED, "generation", *WRITTEN, "fluency", "drift")
DEFAULT_METRICS = ("accuracy", "probability", "generation", "specificity")


@dataclass(frozen=True)
class HeldOut:
    """A text for perplexity, and how to cut it (`evaluate.perplexity`)."""

    text: str
    window: int = 1024
    stride: int | None = None
    max_tokens: int | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def perplexity(self, model: Any, tokenizer: Any, **options: Any) -> float:
        """Of the model as it stands; `options` as for `evaluate.perplexity`."""
        options |= {"window": self.window, "stride": self.stride, "max_tokens": self.max_tokens}
        return perplexity(model, tokenizer, self.text, **options)


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[EditRecord],
    *,
    base: BaseAnswers | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    held_out: HeldOut | None = None,
    passing: int = DEFAULT_PASSING,
    seed: int = 0,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Scores the model as it stands on `records`.

    Args:
        model: a causal LM, edited (its hooks as they are set) or not.
        records: the edits to judge; all prompts of all records go through shared batches.
        base: the unedited model's answers; None computes them by turning the hooks off. The base's perplexity
            is added to it, so that the same object (or its file) serves every later evaluation.
        metrics: which of METRICS to measure: "accuracy" (reliability, generality, locality), "probability"
            (efficacy, rome_paraphrase, neighbourhood), "specificity" (paraphrase, same_subject, portability, with
            reliability and locality), "generation" (exact match), "leak" and "passing" (the new answer where it was
            not asked for), "repeats", "said" (as a user meets the edit), "fluency", "drift".
        held_out: text for perplexity; None leaves it out.
        passing: how many of the texts that mention its subject in passing a record is asked, 1..20.
        seed: of fluency's samples.
        batch_tokens: most tokens in one forward pass.

    Raises:
        ValueError: records is empty, a metric is unknown, `passing` is not in 1..20, or `base` belongs to another
            model or other records.
    """
    if not records:
        raise ValueError("records is empty: there is nothing to evaluate")
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics must be among {METRICS}, got {unknown}")
    passing_texts("", passing)  # raises where there are not as many
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    if base is None:
        base = BaseAnswers.collect(model, tokenizer, records, **options)
    else:
        base.check(model, records)
    if held_out is not None and held_out.key not in base.perplexity:
        with unedited(model):
            base.perplexity[held_out.key] = held_out.perplexity(model, tokenizer, **options)

    start = time.perf_counter()
    results = [
        RecordResult(index, record.request.case_id, record.request.subject) for index, record in enumerate(records)
    ]
    subjects = {record.request.subject for record in records}
    answers = [AnswerPlan.of(tokenizer, record, base, index, subjects) for index, record in enumerate(records)]
    if set(metrics) & set(SCORED):
        score_answers(model, answers, results, metrics, **options)
    if "generation" in metrics:
        _generate(model, tokenizer, answers, results, options)
    # Passes of one token a text: as many texts at once as their cache, not a pass, has room for.
    at_once = options | {"batch_tokens": 8 * batch_tokens}
    if set(metrics) & set(WRITTEN):
        texts = [TextPlan.of(tokenizer, record, passing) for record in records]
        write_texts(model, tokenizer, texts, results, base, metrics, **at_once)
    if "fluency" in metrics:
        prompts = [record.request.text for record in records]
        fluencies = fluency(model, tokenizer, prompts, seed=seed, **at_once)
        for result, value in zip(results, fluencies, strict=True):
            result.fluency = value
    if "drift" in metrics:
        for result, value in zip(results, drift(model, tokenizer, records, **options), strict=True):
            result.drift = value
    evaluation = Evaluation(results)
    if held_out is not None:
        evaluation.perplexity = held_out.perplexity(model, tokenizer, **options)
        evaluation.base_perplexity = base.perplexity[held_out.key]
    evaluation.seconds = time.perf_counter() - start
    return evaluation


def _generate(
    model: Any,
    tokenizer: Any,
    plans: Sequence[AnswerPlan],
    results: Sequence[RecordResult],
    options: dict[str, Any],
) -> None:
    """Fills in the exact match of greedy generation, with as many tokens as the new answer has."""
    pairs = list(dict.fromkeys(pair for plan in plans for pair in plan.new))
    written = continue_greedily(model, [pair.prompt for pair in pairs], [len(pair.target) for pair in pairs], **options)
    texts = dict(zip(pairs, written, strict=True))
    for plan, result in zip(plans, results, strict=True):
        hits = [float(texts[pair] == pair.target) for pair in plan.new]
        result.generation = hits[0]
        result.generation_rephrase = mean(hits[1:])
        result.completion = tokenizer.decode(texts[plan.new[0]])
