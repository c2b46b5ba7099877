"""Editor: the loop over batches of edits (docs/method.md section 2), and nothing else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

import torch
from torch import Tensor

from coachhook_fast.editing.answers import answers_of
from coachhook_fast.editing.edited_model import BeforeCommit, EditedModel
from coachhook_fast.editing.gradients import check_gradients
from coachhook_fast.editing.hard_negatives import find_hard_negatives
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.memories import each_or_none, memories_without
from coachhook_fast.editing.outcomes import check_said, outcomes_of, warn_of_weak
from coachhook_fast.editing.schedule import Assignment, assign, in_batch_order
from coachhook_fast.editing.single_facts import Places, left_of, removals, superseded
from coachhook_fast.editing.sinks import away_from_sinks
from coachhook_fast.editing.targets.cache import TargetCache
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.editing.targets.wordings import Wordings
from coachhook_fast.editing.updates import Observer, lower_alphas, update_layers
from coachhook_fast.edits.edit_set import Batch, EditSet
from coachhook_fast.edits.removal import removed_keys, without_requests
from coachhook_fast.interrupts import deferred
from coachhook_fast.models.distributed import of_first_rank
from coachhook_fast.models.loading import context_length
from coachhook_fast.models.passes.forward import frozen
from coachhook_fast.models.wrappers import check_no_adapters
from coachhook_fast.progress import track
from coachhook_fast.request import EditRequest, TokenisedRequest, TokenRow, check_batch, tokenise_batch
from coachhook_fast.statistics.corpus import begin_tokens


class Editor(EditedModel):
    """Edits a transformers causal language model in consecutive batches.

    Args:
        model: base model of a family that is known or shows its layers (docs/models.md), or of any with its modules
            named in `config`. Hooks are installed at once; no base weight is ever written.
        tokenizer: the model's tokenizer.
        config: settings; None takes the defaults, or those of `edits`.
        edits: folder of a saved edit set to go on from.

    Raises:
        ValueError: unknown architecture, layers out of range, or an edit set of another base model or with other
            settings of layers, λ or contexts.
    """

    def edit(
        self,
        requests: Sequence[EditRequest],
        *,
        require_said: bool = False,
        progress: bool = True,
        observer: Observer | None = None,
        before_commit: BeforeCommit | None = None,
    ) -> Batch:
        """Applies one batch of edits; all of it, or, on any error or interrupt, nothing.

        A request about a fact that the ledger holds (the same prompt, or the same template around the same subject, but
        for whitespace) takes its place: the old edit is taken out first, as `remove` does it, so that target values,
        keys and thresholds are found as if it had never been. What repeats the latest edit of its fact, target,
        paraphrases and all, leaves it where it is.

        Args:
            requests: the facts to change.
            require_said: refuse the batch unless the edited model, asked greedily in each bare prompt, says the target.
            progress: show a bar on stderr.
            observer: called as observer(event, layer, **tensors) with "values" (V), "update" (K as the layer learns it,
                R, X, s, and N, of hard negatives and interfering keys) a layer and "threshold" (value) a layer.
            before_commit: called with the new edit set before it takes the old one's place; what it raises leaves the
                old one there. A service saves there, so that disk and model never differ.

        Raises:
            ValueError: see `request.tokenise_batch`, `optimise`, `KeyMemory.solve`, `without_requests`; or the editor
                was unloaded.
            NotSaidError: with `require_said`, naming what is not said.

        Examples:
            >>> batch = editor.edit([EditRequest("The {} is located in the city of", "Eiffel Tower", "Rome")])
            >>> batch.outcomes[0].said
            True
        """
        with self._all_or_nothing():
            edited, memories, cache = self._edited(requests, progress, observer)
            batch = edited.batches[-1]
            if require_said:
                check_said(batch.outcomes)
            self._commit(edited, memories, before_commit)
            cache.discard()
        warn_of_weak(batch.outcomes, self.config)
        return batch

    @contextmanager
    def trial(self, requests: Sequence[EditRequest], *, progress: bool = True) -> Iterator[Batch]:
        """Within the block the model answers as after `edit(requests)`; afterwards all is as before, bit for bit.

        Target values that were found stay in the cache: an edit of the same batch right after it is quick.

        Raises:
            ValueError: as `edit`.

        Examples:
            >>> with editor.trial([request]) as batch:
            ...     print(batch.outcomes[0].answer, complete(model, tokenizer, questions))
        """
        with self._all_or_nothing():
            edited, _, _ = self._edited(requests, progress, None)
            yield edited.batches[-1]

    def _edited(
        self, requests: Sequence[EditRequest], progress: bool, observer: Observer | None
    ) -> tuple[EditSet, list[KeyMemory], TargetCache]:
        """What `edit` commits: the edit set with the batch, which the hooks serve already, the memories that are to
        learn its keys, and its targets."""
        started = time.monotonic()
        check_no_adapters(self.model)
        if torch.is_inference_mode_enabled():
            raise ValueError("an edit needs gradients: call it outside torch.inference_mode()")
        check_batch(requests)
        replaced = superseded(self.edit_set, requests)
        if replaced:  # what cannot be taken out is said before any work
            removed_keys(self.edit_set, replaced)
        tokens = tokenise_batch(
            requests, self.tokenizer, self.edit_set.contexts, context_length(self.model),
            wordings=self._find_wordings, earlier=left_of(self.edit_set, replaced),
        )  # fmt: skip
        if not self.memories:
            self.collect_statistics(progress=progress)
        assert self.statistics is not None
        tell = observer or (lambda *_, **__: None)
        with frozen(self.model), track("editing", len(tokens), "edit", progress) as bar:
            pad_id, limit = self._pad_id, self.config.pass_tokens
            start, memories = self._without(replaced)
            assignments = assign(start, tokens)
            self._handle.force_modes(["off"] * len(self.hooks))
            asked = tokens  # as users ask, at sinks too
            tokens = away_from_sinks(
                self.partial, max(part.last for part in assignments), tokens, pad_id=pad_id, max_tokens=limit
            )
            # A new edit goes on top of all earlier ones, whoever has switched them off.
            self._handle.force_modes(["gated"] * len(self.hooks))
            v0 = self._bare_outputs(tokens, assignments)
            check_gradients(self.partial, max(self.layers), tokens[0].bare, pad_id=pad_id)
            cache = TargetCache(start, tokens)
            bar.advance(len(cache.found), "found before")
            targets: dict[int, Target] = {}
            with torch.enable_grad():  # whatever the caller has switched off
                for assignment in assignments:
                    found = optimise(
                        self.partial, assignment.last, tokens, v0, self.config, pad_id=pad_id,
                        whole_rows=self.config.gate == "sequence", bar=bar, only=assignment.requests, known=cache.found,
                        keep=cache.keep, budget=self._budget,
                    )  # fmt: skip
                    tell("values", assignment.last, V=torch.stack([target.value for target in found], dim=1))
                    targets |= zip(assignment.requests, found, strict=True)
            ordered = [targets[index] for index in range(len(tokens))]
            updated = update_layers(
                self.partial, self._handle, memories, start, tokens, assignments,
                torch.stack([target.value for target in ordered], dim=1), self._threshold,
                moments=self.statistics.moments, hard_negatives=self._hard_negatives(tokens), pad_id=pad_id, tell=tell,
            )  # fmt: skip
            if self.config.gate == "sequence":
                updated = lower_alphas(self.partial, self._handle, updated, tokens)
            for layer, threshold in zip(self.layers, updated.edits.thresholds, strict=True):
                tell("threshold", layer, value=threshold.value)
            after = self._bare_outputs(tokens, assignments)
            answers = answers_of(self.partial, asked, pad_id=pad_id, max_tokens=limit)
            batch = Batch(
                id=of_first_rank(uuid.uuid4().hex[:12]),
                time=of_first_rank(datetime.now(timezone.utc).isoformat(timespec="seconds")),
                outcomes=outcomes_of(tokens, ordered, v0, after, updated.leverages, answers, self.tokenizer),
                seconds=time.monotonic() - started,
                layers=updated.layers,
                thresholds=updated.edits.thresholds,
            )
            gone = removals(self.edit_set, replaced, "superseded", by=batch.id)
        return updated.edits.with_batch(batch).with_removed(gone), memories, cache

    def _find_wordings(self, requests: Sequence[EditRequest]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Paraphrases and prompts to keep of each request, beside its own."""
        paraphrases, keep = self.config.found_paraphrases, self.config.found_keep
        assert paraphrases is not None  # resolved when the set was made
        assert keep is not None
        if paraphrases == keep == 0:
            return [((), ())] * len(requests)
        with self.disabled(), frozen(self.model):
            if self._wordings is None:
                self._wordings = Wordings(self.partial, self.tokenizer, self.model_id, pad_id=self._pad_id)
            return self._wordings.find(requests, paraphrases=paraphrases, keep=keep)

    def _bare_outputs(self, batch: Sequence[TokenisedRequest], assignments: Sequence[Assignment]) -> Tensor:
        """[m, n], output of the last block that each request edits at its lookup, with the hooks as they are."""
        limits = {"pad_id": self._pad_id, "max_tokens": self.config.pass_tokens}
        parts = [
            bare_outputs(self.partial, t.last, [batch[index] for index in t.requests], **limits) for t in assignments
        ]
        return in_batch_order(parts, assignments)

    def _hard_negatives(self, batch: Sequence[TokenisedRequest]) -> list[TokenRow]:
        """Texts of the corpus that the batch should pass by."""
        assert self.statistics is not None
        assert self.config.hard_negatives is not None
        return find_hard_negatives(
            self.statistics.text,
            batch,
            self.tokenizer,
            begin=begin_tokens(self.tokenizer),
            most=self.config.hard_negatives,
        )

    def _without(self, replaced: Places) -> tuple[EditSet, list[KeyMemory]]:
        """The edit set, published, and the memories from which a batch starts that takes the place of `replaced`."""
        if not replaced:
            return self.edit_set, self.memories
        memories = memories_without(self.memories, self.edit_set, replaced)
        start = without_requests(self.edit_set, replaced, self._threshold)
        self._handle.publish(start)
        return start, memories

    def _commit(self, edited: EditSet, memories: list[KeyMemory], before: BeforeCommit | None) -> None:
        """The point of no return: memories, hooks and edit set change together."""
        with deferred(), each_or_none(memories, [update.keys for update in edited.batches[-1].layers]):
            if before is not None:
                before(edited)
            self._handle.publish(edited)
            self.edit_set, self.memories = edited, memories
