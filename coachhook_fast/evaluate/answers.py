"""What teacher-forced answers say of an edit: EasyEdit's metrics, ROME's, and those of the edited subject.

One pass scores the pairs of all records and metrics; an identical pair is scored once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.evaluate.base import BaseAnswers
from coachhook_fast.evaluate.mentions import names_any
from coachhook_fast.evaluate.record import EditRecord
from coachhook_fast.evaluate.result import RecordResult, mean, means_by_kind
from coachhook_fast.evaluate.scoring import Ids, Pair, Score, encode_pair, score_distinct

SCORED = ("accuracy", "probability", "specificity")


@dataclass(frozen=True)
class AnswerPlan:
    """The pairs to score for one record, and what the unedited model says there."""

    record: EditRecord
    new: list[Pair]  # the new answer after the edit prompt and then the rephrase prompts
    old: list[Pair]  # the old answer after the same, or nothing
    paraphrases: list[Pair]  # the new answer after each
    same_question: list[bool]  # whether the base begins its answer there as after the edit prompt
    neighbours: list[Pair]  # the neighbours' answers, or the base's next token where there is none
    neighbours_base: list[Ids]  # what the base predicts there
    unedited: list[bool]  # whether the neighbour names no edited subject
    rivals: list[tuple[int, Pair]]  # neighbours with an answer of their own: index, and the edit's new answer there
    same_subject: list[Pair]
    same_subject_base: list[Ids]
    portability: list[Pair]

    @classmethod
    def of(cls, tokenizer: Any, record: EditRecord, base: BaseAnswers, index: int, subjects: set[str]) -> AnswerPlan:
        """The plan of `record`, number `index` of those that `base` answered; `subjects` are those of all of them."""

        def pairs(prompts: Collection[str], target: str) -> list[Pair]:
            return [encode_pair(tokenizer, prompt, target) for prompt in prompts]

        request = record.request
        prompts, truth = (request.text, *record.rephrase_prompts), request.ground_truth
        first, *others = base.first_tokens[index]
        rivals = pairs(record.locality_prompts, request.target_new)
        neighbours = []
        for number, (prompt, answer) in enumerate(zip(record.locality_prompts, record.locality_answers, strict=True)):
            if answer is None:
                neighbours.append(Pair(rivals[number].prompt, base.neighbours[index][number]))
            else:
                neighbours.append(encode_pair(tokenizer, prompt, answer))
        return cls(
            record=record,
            new=pairs(prompts, request.target_new),
            old=pairs(prompts, truth) if truth and truth.strip() else [],
            paraphrases=pairs(record.paraphrases, request.target_new),
            same_question=[token == first for token in others],
            neighbours=neighbours,
            neighbours_base=base.neighbours[index],
            unedited=[not names_any(prompt, subjects) for prompt in record.locality_prompts],
            rivals=[
                (number, rivals[number]) for number, answer in enumerate(record.locality_answers) if answer is not None
            ],
            same_subject=[encode_pair(tokenizer, fact.prompt, fact.answer) for fact in record.same_subject],
            same_subject_base=base.same_subject[index],
            portability=[encode_pair(tokenizer, fact.prompt, fact.answer) for fact in record.portability],
        )

    def pairs(self, metrics: Collection[str]) -> list[Pair]:
        """What `metrics` need."""
        found = [self.new[0], *self.neighbours]
        if "accuracy" in metrics or "probability" in metrics:
            found += self.new[1:]
        if "probability" in metrics:
            found += self.old + [pair for _, pair in self.rivals]
        if "specificity" in metrics:
            found += self.paraphrases + self.same_subject + self.portability
        return found


def score_answers(
    model: Any,
    plans: Sequence[AnswerPlan],
    results: Sequence[RecordResult],
    metrics: Collection[str],
    **options: Any,
) -> None:
    """Fills in what `metrics` (of SCORED) ask for; `options` are `score_pairs`'s."""
    scores = score_distinct(model, [pair for plan in plans for pair in plan.pairs(metrics)], **options)
    for plan, result in zip(plans, results, strict=True):
        if "accuracy" in metrics or "specificity" in metrics:
            _reliability_and_locality(plan, scores, result)
        if "accuracy" in metrics:
            accuracies = _accuracies(plan.new[1:], scores)
            result.generality = mean(accuracies)
            result.kinds |= means_by_kind("generality", plan.record.rephrase_kinds, accuracies)
        if "probability" in metrics:
            _probability(plan, scores, result)
        if "specificity" in metrics:
            _specificity(plan, scores, result)


def _reliability_and_locality(plan: AnswerPlan, scores: Mapping[Pair, Score], result: RecordResult) -> None:
    (result.reliability,) = _accuracies(plan.new[:1], scores)
    kept = _agreements(plan.neighbours, plan.neighbours_base, scores)
    result.locality = mean(kept)
    result.locality_unedited = mean([share for share, one in zip(kept, plan.unedited, strict=True) if one])
    result.kinds |= means_by_kind("locality", plan.record.locality_kinds, kept)


def _probability(plan: AnswerPlan, scores: Mapping[Pair, Score], result: RecordResult) -> None:
    if plan.old:
        wins = [_prefers(scores[a], scores[b]) for a, b in zip(plan.new, plan.old, strict=True)]
        result.efficacy = wins[0]
        result.rome_paraphrase = mean(wins[1:])
    result.neighbourhood = mean([_prefers(scores[plan.neighbours[index]], scores[one]) for index, one in plan.rivals])


def _specificity(plan: AnswerPlan, scores: Mapping[Pair, Score], result: RecordResult) -> None:
    accuracies = _accuracies(plan.paraphrases, scores)
    result.paraphrase = mean(accuracies)
    result.paraphrase_same_question = mean(
        [value for value, same in zip(accuracies, plan.same_question, strict=True) if same]
    )
    result.same_subject = mean(_agreements(plan.same_subject, plan.same_subject_base, scores))
    moved = _accuracies(plan.portability, scores)
    result.portability = mean(moved)
    result.kinds |= means_by_kind("portability", [one.kind for one in plan.record.portability], moved)


def _accuracies(pairs: Sequence[Pair], scores: Mapping[Pair, Score]) -> list[float]:
    return [scores[pair].agreement(pair.target) for pair in pairs]


def _agreements(pairs: Sequence[Pair], base: Sequence[Ids], scores: Mapping[Pair, Score]) -> list[float]:
    return [scores[pair].agreement(ids) for pair, ids in zip(pairs, base, strict=True)]


def _prefers(one: Score, other: Score) -> float:
    return float(one.mean_logprob > other.mean_logprob)
