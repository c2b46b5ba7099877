"""Whether an edited model says the facts of its ledger: each asked greedily, in its prompt and its paraphrases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.editing.answers import answers_to
from coachhook_fast.edits.edit_set import EditOutcome, EditSet
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.request import SLOT, EditRequest, TokenRow, filled, prompt_row


@dataclass(frozen=True)
class AnswerCheck:
    """One question and what the model says to it.

    Attributes:
        text: the question, with the context that it was asked behind.
        said: whether the greedy continuation is the target, token by token.
        answer: that continuation up to the first token that is not the target's.
    """

    text: str
    said: bool
    answer: str


@dataclass(frozen=True)
class FactCheck:
    """What the model says of one fact of the ledger.

    Attributes:
        batch, index: where it stands, see `EditSet.numbers`.
        request: the edit.
        prompt: the answer to its prompt; paraphrases: to each of the request's own.
        in_context_only: the edit holds behind other text only (editing/sinks.py): its prompt was asked behind one.
    """

    batch: str
    index: int
    request: EditRequest
    prompt: AnswerCheck
    paraphrases: tuple[AnswerCheck, ...] = ()
    in_context_only: bool = False

    @property
    def said(self) -> bool:
        """Whether the prompt and every paraphrase give the target."""
        return all(answer.said for answer in (self.prompt, *self.paraphrases))


def check_facts(
    partial: PartialModel, tokenizer: Any, edit_set: EditSet, *, pad_id: int, max_tokens: int
) -> list[FactCheck]:
    """Asks for every fact of the ledger, oldest first, with the hooks as they are."""
    before = next((context for context in edit_set.contexts if SLOT not in context), "")
    facts = [
        (batch.id, index, outcome, _questions(tokenizer, outcome, before))
        for batch in edit_set.batches
        for index, outcome in zip(edit_set.numbers(batch), batch.outcomes, strict=True)
    ]
    rows = [row for *_, questions in facts for _, row in questions]
    answers = iter(answers_to(partial, rows, pad_id=pad_id, max_tokens=max_tokens))
    checks = []
    for batch_id, index, outcome, questions in facts:
        found = []
        for text, _ in questions:
            answer = next(answers)
            found.append(AnswerCheck(text, answer.is_target, tokenizer.decode(answer.tokens)))
        checks.append(FactCheck(batch_id, index, outcome.request, found[0], tuple(found[1:]), outcome.in_context_only))
    return checks


def _questions(tokenizer: Any, outcome: EditOutcome, before: str) -> Sequence[tuple[str, TokenRow]]:
    """(text, tokens) of the prompt and of each paraphrase; behind the context `before` where the edit holds only
    there, and a paraphrase also where its subject would be the text's first token, as it was when it was edited."""
    request = outcome.request
    questions = []
    for number, wording in enumerate((request.prompt, *request.paraphrases)):
        bare = prompt_row(tokenizer, wording, request.subject, request.target_new)
        if before and (outcome.in_context_only or (number and not bare.lookup)):
            behind = prompt_row(tokenizer, wording, request.subject, request.target_new, before=before)
            questions.append((f"{before}. {filled(wording, request.subject)}", behind))
        else:
            questions.append((filled(wording, request.subject), bare))
    return questions
