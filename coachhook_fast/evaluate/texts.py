"""What an edited model writes when it is let write: whether it says the answer, and where else it does.

All texts are greedy and end where the model ends them, or after so many tokens. A prompt that several metrics ask is
continued once, for the longest of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.chat import chat_text
from coachhook_fast.evaluate.base import BaseAnswers
from coachhook_fast.evaluate.generation import continue_greedily
from coachhook_fast.evaluate.mentions import mentions
from coachhook_fast.evaluate.passing import passing_texts
from coachhook_fast.evaluate.questions import question_of
from coachhook_fast.evaluate.record import EditRecord
from coachhook_fast.evaluate.result import RecordResult, mean
from coachhook_fast.evaluate.scoring import Ids
from coachhook_fast.models.loading import context_length
from coachhook_fast.request import prompt_ids

WRITTEN = ("leak", "passing", "repeats", "said")
ANSWER_TOKENS = 24  # within these an answer is said, or leaks
CHAT_TOKENS = 48  # an assistant restates the sentence before it ends it
REPEAT_TOKENS = 64
CHAT_REQUEST = "Complete the sentence: {}"


@dataclass(frozen=True)
class TextPlan:
    """The prompts of one record that are continued, as token ids."""

    record: EditRecord
    edit: Ids
    paraphrases: list[Ids]
    same_subject: list[Ids]
    passing: list[Ids]
    question: Ids | None
    chat: Ids | None

    @classmethod
    def of(cls, tokenizer: Any, record: EditRecord, passing: int) -> TextPlan:
        def ids(text: str) -> Ids:
            return tuple(prompt_ids(tokenizer, text))

        request, question = record.request, question_of(record)
        # A fact whose answer is the new one, or names it, may say it.
        facts = [fact for fact in record.same_subject if not mentions(fact.answer, request.target_new)]
        return cls(
            record=record,
            edit=ids(request.text),
            paraphrases=[ids(text) for text in record.paraphrases],
            same_subject=[ids(fact.prompt) for fact in facts],
            passing=[ids(text) for text in passing_texts(request.subject, passing)],
            question=None if question is None else ids(question),
            chat=_chat_ids(tokenizer, request.text),
        )

    def compared(self, metrics: Collection[str]) -> dict[Ids, int]:
        """Tokens wanted after each prompt whose text is compared with the unedited model's."""
        found: dict[Ids, int] = {}
        if "leak" in metrics:
            found |= dict.fromkeys(self.same_subject, ANSWER_TOKENS)
        if "passing" in metrics:
            found |= dict.fromkeys(self.passing, ANSWER_TOKENS)
        if "repeats" in metrics:
            found[self.edit] = REPEAT_TOKENS
        return found

    def judged(self, metrics: Collection[str]) -> dict[Ids, int]:
        """The same for the prompts whose text is judged alone."""
        if "said" not in metrics:
            return {}
        found = dict.fromkeys([self.edit, *self.paraphrases], ANSWER_TOKENS)
        if self.question is not None:
            found[self.question] = ANSWER_TOKENS
        if self.chat is not None:
            found[self.chat] = CHAT_TOKENS
        return found


def write_texts(
    model: Any,
    tokenizer: Any,
    plans: Sequence[TextPlan],
    results: Sequence[RecordResult],
    base: BaseAnswers,
    metrics: Collection[str],
    **options: Any,
) -> None:
    """Fills in what `metrics` (of WRITTEN) ask for; `options` are `continue_greedily`'s. The unedited model's texts
    are kept in `base`.

    Raises:
        ValueError: a prompt with its continuation would be longer than the model's context.
    """
    compared = _longest(plan.compared(metrics) for plan in plans)
    lengths = _longest([compared, *(plan.judged(metrics) for plan in plans)])
    _check_lengths(model, lengths)
    before = base.write(model, compared, **options)
    rows = dict(zip(lengths, continue_greedily(model, [*lengths], [*lengths.values()], **options), strict=True))
    for plan, result in zip(plans, results, strict=True):
        judge = _Judge(tokenizer, plan.record.request.target_new, rows, before)
        if "leak" in metrics:
            result.leak = mean([judge.leaks(ids) for ids in plan.same_subject])
        if "passing" in metrics:
            result.leak_passing = mean([judge.leaks(ids) for ids in plan.passing])
        if "repeats" in metrics:
            result.repeats = judge.repeats(plan.edit)
        if "said" in metrics:
            result.said = judge.says(plan.edit)
            result.said_paraphrase = mean([judge.says(ids) for ids in plan.paraphrases])
            result.said_question = None if plan.question is None else judge.says(plan.question)
            result.said_chat = None if plan.chat is None else judge.says(plan.chat, CHAT_TOKENS)
        if plan.edit in rows:
            result.written = tokenizer.decode(rows[plan.edit], skip_special_tokens=True)


@dataclass(frozen=True)
class _Judge:
    """Counts one record's new answer in the texts of the model as it stands and of the unedited one."""

    tokenizer: Any
    answer: str
    now: Mapping[Ids, Ids]
    before: Mapping[Ids, Ids]

    def _count(self, row: Ids, length: int) -> int:
        return mentions(self.tokenizer.decode(row[:length], skip_special_tokens=True), self.answer)

    def says(self, prompt: Ids, length: int = ANSWER_TOKENS) -> float:
        return float(self._count(self.now[prompt], length) > 0)

    def leaks(self, prompt: Ids) -> float:
        return float(self.says(prompt) > 0 and self._count(self.before[prompt], ANSWER_TOKENS) == 0)

    def repeats(self, prompt: Ids) -> float:
        """Mentions but the first, less the unedited model's, 0 or more."""
        now, before = (self._count(rows[prompt], REPEAT_TOKENS) for rows in (self.now, self.before))
        return float(max(0, now - 1 - before))


def _chat_ids(tokenizer: Any, text: str) -> Ids | None:
    """The edit prompt as a user's request, up to where the assistant begins; None without a chat template."""
    chat = chat_text(tokenizer, text if text.rstrip().endswith("?") else CHAT_REQUEST.replace("{}", text))
    if chat is None:
        return None
    return tuple(tokenizer(chat, add_special_tokens=False)["input_ids"])  # the template writes its own


def _longest(wanted: Iterable[Mapping[Ids, int]]) -> dict[Ids, int]:
    lengths: dict[Ids, int] = {}
    for one in wanted:
        for ids, length in one.items():
            lengths[ids] = max(length, lengths.get(ids, 0))
    return lengths


def _check_lengths(model: Any, lengths: Mapping[Ids, int]) -> None:
    limit = context_length(model)
    longest = max((len(ids) + length for ids, length in lengths.items()), default=0)
    if limit is not None and longest > limit:
        raise ValueError(f"a prompt with the text after it takes {longest} tokens, the model's context is {limit}")
