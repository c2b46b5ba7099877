"""`evaluate`: every metric of a set of edits in as few passes as possible.

EasyEdit's reliability, generality and locality, ROME's successes by probability, exact match of greedy
generation, fluency and perplexity; docs/evaluation.md defines them one by one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.evaluate.base import BaseAnswers, unedited
from coachhook_fast.evaluate.datasets import EditRecord
from coachhook_fast.evaluate.drift import drift
from coachhook_fast.evaluate.generation import continue_greedily, fluency
from coachhook_fast.evaluate.mentions import names_any
from coachhook_fast.evaluate.perplexity import perplexity
from coachhook_fast.evaluate.result import Evaluation, RecordResult
from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, Ids, Pair, Score, score_pairs
from coachhook_fast.request import encode_prompt_target

METRICS = ("accuracy", "probability", "generation", "fluency", "drift")
DEFAULT_METRICS = ("accuracy", "probability", "generation")


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
            (efficacy, paraphrase, neighbourhood), "generation" (exact match), "fluency", "drift".
        held_out: text for perplexity; None leaves it out.
        seed: of fluency's samples.
        batch_tokens: most tokens in one forward pass.

    Raises:
        ValueError: records is empty, a metric is unknown, or `base` belongs to another model or other
        records.
    """
    if not records:
        raise ValueError("records is empty: there is nothing to evaluate")
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics must be among {METRICS}, got {unknown}")
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
    plans = [
        _Plan.of(tokenizer, record, answers, subjects) for record, answers in zip(records, base.neighbours, strict=True)
    ]
    if "accuracy" in metrics or "probability" in metrics:
        _score(model, plans, results, metrics, options)
    if "generation" in metrics:
        _generate(model, tokenizer, plans, results, options)
    if "fluency" in metrics:
        prompts = [record.request.text for record in records]
        # passes of one token a text: as many texts at once as their cache, not a pass, has room for
        fluencies = fluency(model, tokenizer, prompts, seed=seed, batch_tokens=8 * batch_tokens, progress=progress)
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


@dataclass(frozen=True)
class _Plan:
    """The pairs to score for one record."""

    new: list[Pair]  # the new answer after the edit prompt and then the paraphrases
    old: list[Pair]  # the old answer after the same, or nothing
    neighbours: list[Pair]  # the neighbours' answers, or the base's next token where there is none
    base: list[Ids]  # what the base predicts there
    unedited: list[bool]  # whether the neighbour names no edited subject
    # neighbours with an answer of their own: index, and the edit's new answer there
    rivals: list[tuple[int, Pair]]

    @classmethod
    def of(cls, tokenizer: Any, record: EditRecord, base: list[Ids], subjects: set[str]) -> _Plan:
        def pair(prompt: str, target: str) -> Pair:
            prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, target)
            return Pair(tuple(prompt_ids), tuple(target_ids))

        request = record.request
        prompts = (request.text, *record.rephrase_prompts)
        truth = request.ground_truth
        neighbours, rivals = [], []
        for index, (prompt, answer) in enumerate(zip(record.locality_prompts, record.locality_answers, strict=True)):
            if answer is None:
                neighbours.append(Pair(pair(prompt, request.target_new).prompt, base[index]))
            else:
                neighbours.append(pair(prompt, answer))
                rivals.append((index, pair(prompt, request.target_new)))
        return cls(
            new=[pair(prompt, request.target_new) for prompt in prompts],
            old=[pair(prompt, truth) for prompt in prompts] if truth and truth.strip() else [],
            neighbours=neighbours,
            base=base,
            unedited=[not names_any(prompt, subjects) for prompt in record.locality_prompts],
            rivals=rivals,
        )


def _score(
    model: Any,
    plans: Sequence[_Plan],
    results: Sequence[RecordResult],
    metrics: Sequence[str],
    options: dict[str, Any],
) -> None:
    """Fills in EasyEdit's and ROME's metrics from one scoring pass over all pairs."""
    by_probability = "probability" in metrics
    pairs: list[Pair] = []
    for plan in plans:
        pairs += plan.new + plan.neighbours
        if by_probability:
            pairs += plan.old + [pair for _, pair in plan.rivals]
    # Identical pairs (a neighbour that serves many records) are scored once.
    distinct = list(dict.fromkeys(pairs))
    scores = dict(zip(distinct, score_pairs(model, distinct, **options), strict=True))
    for plan, result in zip(plans, results, strict=True):
        new = [scores[pair] for pair in plan.new]
        near = [scores[pair] for pair in plan.neighbours]
        if "accuracy" in metrics:
            hits = [score.agreement(pair.target) for score, pair in zip(new, plan.new, strict=True)]
            result.reliability = hits[0]
            result.generality = _mean(hits[1:])
            kept = [score.agreement(ids) for score, ids in zip(near, plan.base, strict=True)]
            result.locality = _mean(kept)
            result.locality_unedited = _mean([share for share, one in zip(kept, plan.unedited, strict=True) if one])
        if by_probability:
            if plan.old:
                wins = [_prefers(a, scores[pair]) for a, pair in zip(new, plan.old, strict=True)]
                result.efficacy = wins[0]
                result.paraphrase = _mean(wins[1:])
            result.neighbourhood = _mean([_prefers(near[index], scores[pair]) for index, pair in plan.rivals])


def _generate(
    model: Any,
    tokenizer: Any,
    plans: Sequence[_Plan],
    results: Sequence[RecordResult],
    options: dict[str, Any],
) -> None:
    """Fills in the exact match of greedy generation, with as many tokens as the new answer has."""
    pairs = [pair for plan in plans for pair in plan.new]
    written = continue_greedily(model, [pair.prompt for pair in pairs], [len(pair.target) for pair in pairs], **options)
    texts = iter(written)
    for plan, result in zip(plans, results, strict=True):
        mine = [next(texts) for _ in plan.new]
        hits = [float(ids == pair.target) for ids, pair in zip(mine, plan.new, strict=True)]
        result.generation = hits[0]
        result.generation_rephrase = _mean(hits[1:])
        result.completion = tokenizer.decode(mine[0])


def _prefers(one: Score, other: Score) -> float:
    return float(one.mean_logprob > other.mean_logprob)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
