"""Edits of the served model: one at a time, in a thread of their own, on a shared-weight copy of the model.

What is answered is on disk and served; what fails leaves disk, copy and served model as they were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coachhook_fast.editing.editor import Editor
from coachhook_fast.editing.outcomes import RESIDUAL_LEFT_LIMIT
from coachhook_fast.edits import store
from coachhook_fast.edits.edit_set import Batch, EditOutcome, EditSet
from coachhook_fast.evaluate.generation import complete
from coachhook_fast.request import EditRequest, filled, subject_key
from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.logs import log
from coachhook_fast.serve.metrics import Metrics
from coachhook_fast.serve.served import Served
from coachhook_fast.statistics.corpus import Corpus


class Editing:
    """An editor, the folder where its edit set is kept, and the models that serve it. Not for several threads at once.

    Args:
        editor: of a shared-weight copy of the served model.
        served: every model that is to serve what is edited; what the editor holds is published to them here.
        folder: where the edit set is kept.

    editing = Editing(editor, [served], Path("edits"), Metrics())
    editing.edit([EditRequest("{} is in", "Rome", "Spain")])
    """

    def __init__(self, editor: Editor, served: Sequence[Served], folder: Path, metrics: Metrics) -> None:
        self.editor, self.served, self.folder, self.metrics = editor, served, folder, metrics
        self._publish()

    @property
    def ledger(self) -> tuple[Batch, ...]:
        """Any thread may read it: one value that is replaced whole."""
        return self.editor.ledger

    @property
    def version(self) -> str:
        """Of what is served."""
        return self.served[0].version

    def prepare(self, corpus: Corpus | None = None) -> None:
        """Collects the key statistics, which the first edit would wait for. ValueError as `collect_statistics`."""
        began = time.monotonic()
        self.editor.collect_statistics(corpus, progress=False)
        log("statistics_ready", seconds=round(time.monotonic() - began, 2))

    def edit(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        """Edits a batch, saves it and serves it.

        Raises:
            ValueError: as `Editor.edit`. ConflictError: another writer has the folder. OSError: it cannot be saved.
        """
        batch = self.editor.edit(requests, progress=False, before_commit=self._save)
        self._publish()
        self.metrics.add("coachhook_edit_seconds_sum", batch.seconds)
        log("edited", batch=batch.id, edits=len(batch.outcomes), seconds=round(batch.seconds, 2))
        return {**described(batch, range(len(batch.outcomes))), "version": self.version}

    def rollback(self, batch_id: str) -> dict[str, Any]:
        """Undoes a batch, on disk and in what is served. ApiError 404 where there is none; else as `edit`."""
        self.check_batch(batch_id)
        self.editor.rollback(batch_id, before_commit=self._save)
        self._publish()
        log("rolled_back", batch=batch_id)
        return {"rolled_back": batch_id, "version": self.version}

    def remove(self, batch_id: str, index: int) -> dict[str, Any]:
        """Undoes one fact of a batch, by its number there. ApiError 404 where there is none; else as `edit`."""
        self.check_fact(batch_id, index)
        self.editor.remove(batch_id, index, before_commit=self._save)
        self._publish()
        log("removed", batch=batch_id, index=index)
        return {"removed": [batch_id, index], "version": self.version}

    def check_batch(self, batch_id: str) -> None:
        """ApiError 404 where the ledger has no batch of that id."""
        if batch_id not in [batch.id for batch in self.ledger]:
            raise ApiError(404, f"no batch {batch_id!r}", param="batch", code="batch_not_found")

    def check_fact(self, batch_id: str, index: int) -> None:
        """ApiError 404 where the batch has no fact of that number, or has it no more."""
        self.check_batch(batch_id)
        try:
            self.editor.edit_set.place_of(batch_id, index)
        except ValueError as error:
            raise ApiError(404, str(error), param="index", code="fact_not_found") from None

    def listed(self) -> dict[str, Any]:
        """The ledger as JSON. Any thread may ask."""
        edit_set = self.editor.edit_set
        return {
            "version": self.version,
            "batches": [described(batch, edit_set.numbers(batch)) for batch in edit_set.batches],
            "removed": [
                {
                    "batch": one.batch,
                    "index": one.index,
                    "text": one.request.text,
                    "target_new": one.request.target_new,
                    "time": one.time,
                    "reason": one.reason,
                    "by": one.by,
                }
                for one in edit_set.removed
            ],
        }

    def preview(self, requests: Sequence[EditRequest], questions: Sequence[str], max_tokens: int) -> dict[str, Any]:
        """What `edit` would do: how each request goes in, and what the model answers before and after, to what is
        asked, its other wordings, what is to stay, earlier facts of the subject, and `questions`. Nothing stays of it.

        Raises:
            ValueError: as `Editor.edit`; or a question outgrows the model's context.
        """
        began = time.monotonic()
        asked = self._asked(requests, questions)
        prompts = list(dict.fromkeys(prompt for _, _, prompt in asked))
        editor = self.editor

        def answers() -> dict[str, str]:
            texts = complete(editor.model, editor.tokenizer, prompts, max_new_tokens=max_tokens)
            return dict(zip(prompts, texts, strict=True))

        before = answers()
        with editor.trial(requests, progress=False) as batch:
            after = answers()
        log("previewed", edits=len(requests), seconds=round(time.monotonic() - began, 2))
        return {
            "edits": described(batch, range(len(batch.outcomes)))["edits"],
            "answers": [
                {
                    "edit": index,
                    "kind": kind,
                    "prompt": prompt,
                    "before": before[prompt],
                    "after": after[prompt],
                    "changed": before[prompt] != after[prompt],
                }
                for index, kind, prompt in asked
            ],
            "seconds": time.monotonic() - began,
        }

    def _asked(self, requests: Sequence[EditRequest], questions: Sequence[str]) -> list[tuple[int | None, str, str]]:
        """(number of the request, kind, prompt) of all that a preview compares."""
        asked: list[tuple[int | None, str, str]] = []
        for index, request in enumerate(requests):
            own = [("prompt", request.text)]
            own += [("paraphrase", filled(text, request.subject)) for text in request.paraphrases]
            own += [("keep", filled(text, request.subject)) for text in request.keep]
            key = subject_key(request.subject)
            mine = {prompt for _, prompt in own}
            earlier = [fact.text for fact in self.editor.edit_set.requests if subject_key(fact.subject) == key]
            own += [("same subject", text) for text in dict.fromkeys(earlier) if text not in mine]
            asked += [(index, kind, prompt) for kind, prompt in own]
        return asked + [(None, "question", prompt) for prompt in questions]

    def _save(self, edit_set: EditSet) -> None:
        store.save(edit_set, self.folder)

    def _publish(self) -> None:
        for served in self.served:
            served.publish(self.editor.edit_set)


def described(batch: Batch, numbers: Sequence[int]) -> dict[str, Any]:
    """A ledger line as JSON: id, time, seconds and its facts, each with its number and its state."""
    return {
        "id": batch.id,
        "time": batch.time,
        "seconds": batch.seconds,
        "edits": [{"index": number, **_fact(outcome)} for number, outcome in zip(numbers, batch.outcomes, strict=True)],
    }


def _fact(outcome: EditOutcome) -> dict[str, Any]:
    request = outcome.request
    return {
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target_new,
        "ground_truth": request.ground_truth,
        "paraphrases": list(request.paraphrases),
        "keep": list(request.keep),
        "text": request.text,
        "state": state_of(outcome),
        "answer": outcome.answer,
        "said": outcome.said,
        "said_paraphrases": outcome.said_paraphrases,
        "residual_left": outcome.residual_left,
        "in_context_only": outcome.in_context_only,
    }


def state_of(outcome: EditOutcome) -> str:
    """One word or two for a fact: "said", "not said" (the edit went in, the answer is another), "weak" (it did not go
    in), "in context only", or "unknown" (of an edit set that did not ask)."""
    if outcome.residual_left > RESIDUAL_LEFT_LIMIT:
        return "weak"
    if outcome.in_context_only:
        return "in context only"
    return {True: "said", False: "not said", None: "unknown"}[outcome.said]
