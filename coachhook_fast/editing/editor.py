"""Editor: the loop over batches of edits (docs/method.md section 2), and nothing else."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.config import EditConfig
from coachhook_fast.editing import calibration
from coachhook_fast.editing.answers import answers_of
from coachhook_fast.editing.contexts import write_contexts
from coachhook_fast.editing.hard_negatives import find_hard_negatives
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.outcomes import EditWarning, outcomes_of, warn_of_weak
from coachhook_fast.editing.schedule import Assignment, assign, in_batch_order
from coachhook_fast.editing.single_facts import (
    Places,
    each_or_none,
    left_of,
    memories_without,
    removals,
    superseded,
)
from coachhook_fast.editing.sinks import away_from_sinks
from coachhook_fast.editing.targets.cache import TargetCache
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.editing.targets.wordings import Wordings
from coachhook_fast.editing.updates import Observer, lower_alphas, update_layers
from coachhook_fast.edits import store
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditSet, Removed
from coachhook_fast.edits.removal import recalibrated, removed_keys, without_requests
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.interrupts import deferred
from coachhook_fast.model_defaults import default_layers
from coachhook_fast.models.architectures import down_projection_size, layout_of
from coachhook_fast.models.distributed import of_first_rank
from coachhook_fast.models.loading import context_length, fingerprint
from coachhook_fast.models.passes.budget import TokenBudget
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.progress import track
from coachhook_fast.request import EditRequest, TokenisedRequest, TokenRow, check_batch, tokenise_batch
from coachhook_fast.statistics.cache import model_statistics
from coachhook_fast.statistics.corpus import Corpus, begin_tokens
from coachhook_fast.statistics.key_statistics import KeyStatistics


class Editor:
    """Edits a transformers causal language model in consecutive batches.

    Args:
        model: base model of a known family (architectures.LAYOUTS), or of any with its modules named in `config`. Hooks
            are installed at once; no base weight is ever written.
        tokenizer: the model's tokenizer.
        config: settings; None takes the defaults, or those of `edits`.
        edits: folder of a saved edit set to go on from.

    Raises:
        ValueError: unknown architecture, layers out of range, or an edit set of another base model or with other
            settings of layers, λ or contexts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: EditConfig | None = None,
        *,
        edits: str | Path | None = None,
    ) -> None:
        saved = None if edits is None else store.load(Path(edits))
        config = config or (saved.config if saved else EditConfig())
        layout = layout_of(
            model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp
        )
        self.model, self.tokenizer = model, tokenizer
        self.partial = PartialModel(model, layout)
        num_layers = len(self.partial.blocks)
        typical = layout.down_projection(model, default_layers(num_layers)[0])
        out_features, self.key_dim = down_projection_size(typical)
        config = config.resolved(num_layers, self.key_dim)
        assert config.layers is not None
        layers = config.layers
        self._handle = Hooks(model, layout, layers, config.gate)
        self._recalibrate = False  # thresholds of loaded edits are of other settings than config's
        try:
            self._check_devices()
            self.model_id = fingerprint(model)
            if saved is not None:
                store.check_continues(saved, self.model_id, config)
                self.edit_set = replace(saved, config=config)
                self._recalibrate = bool(saved.batches) and config.calibrates_otherwise(saved.config)
            else:
                empty = LowRankDelta.zeros(out_features, self.key_dim, dtype=self.dtype, device=self.partial.device)
                with frozen(model):
                    contexts = write_contexts(model, tokenizer, config)
                start = Threshold(config.alpha if config.gate == "sequence" else float("inf"))
                self.edit_set = EditSet(self.model_id, config, contexts, (empty,) * len(layers), (start,) * len(layers))
            self._handle.publish(self.edit_set)
        except BaseException:
            self._handle.unload()
            raise
        self._budget = TokenBudget(config.max_batch_tokens, self.partial.device)
        self.statistics: KeyStatistics | None = None
        self.memories: list[KeyMemory] = []
        self._wordings: Wordings | None = None

    def _check_devices(self) -> None:
        """ValueError unless the edited blocks compute where the model's inputs are: the editor's tensors are there."""
        for layer, hook in zip(self._handle.layers, self.hooks, strict=True):
            if hook.delta.device != self.partial.device:
                raise ValueError(
                    f"edited block {layer} computes on {hook.delta.device}, the model's inputs are on "
                    f"{self.partial.device}: keep the edited blocks on that device (device_map), or edit others"
                )

    # ---------------------------------------------------------------- what there is

    @property
    def config(self) -> EditConfig:
        return self.edit_set.config

    @property
    def layers(self) -> tuple[int, ...]:
        return self.edit_set.layers

    @property
    def hooks(self) -> list[Any]:
        return self._handle.hooks

    @property
    def ledger(self) -> tuple[Batch, ...]:
        return self.edit_set.batches

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the edits: fp32, or fp64 for fp64 models."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    @property
    def _pad_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0  # padding is masked out everywhere: any token serves

    # ---------------------------------------------------------------- statistics

    def collect_statistics(
        self, corpus: Corpus | None = None, *, max_tokens: int | None = None, progress: bool = True
    ) -> KeyStatistics:
        """Takes or reloads the key statistics of all edited layers, in one pass (see `statistics_cache`).

        Args:
            corpus: text file, iterable of strings or token ids, or dataset; None takes the statistics of the earlier
                batches, where the cache still holds them, else text sampled from the model itself.
            max_tokens: token budget; None takes `mom2_n_tokens` of the config. More of the corpus is tokenised and kept
                to find hard negatives in (`hard_negative_tokens`).
        """
        with self.disabled(), frozen(self.model):
            statistics = model_statistics(
                self.partial, self.tokenizer, self.config, self.model_id, self.key_dim, corpus,
                max_tokens=max_tokens, earlier=self.edit_set.statistics, progress=progress,
            )  # fmt: skip
        self.use_statistics(statistics)
        return statistics

    def use_statistics(self, statistics: KeyStatistics) -> None:
        """Starts the key memories: C = λ E[k kᵀ] + Σ K Kᵀ over the ledger. ValueError if they do not fit the model, or
        are of too little text for an inverse.

        Edits that were loaded and whose config asks for another threshold rule than theirs get their thresholds here.
        Warns (EditWarning) if the earlier batches were made with others.
        """
        statistics.check(self.layers, self.key_dim, self.model_id)
        if self.ledger and self.edit_set.statistics not in ("", statistics.run):
            warnings.warn(
                f"the edits so far were made with other key statistics ({self.edit_set.statistics}, now "
                f"{statistics.run or 'without a name'}): give the same corpus to keep to one measure of ordinary text",
                EditWarning,
                stacklevel=2,
            )
        memories = []
        for position, layer in enumerate(self.layers):
            weight = self.config.mom2_update_weight
            assert weight is not None
            try:
                memory = KeyMemory.from_second_moment(statistics.moments[layer], weight, device=self.partial.device)
            except ValueError as error:
                raise ValueError(
                    f"key statistics of layer {layer}, taken from {statistics.tokens} tokens (text of many more tokens "
                    f"than a key has numbers, {self.key_dim}, is needed): {error}"
                ) from None
            for batch in self.ledger:
                memory.update(batch.layers[position].keys)
            memories.append(memory)
        self.statistics, self.memories = statistics, memories
        self.edit_set = replace(self.edit_set, statistics=statistics.run)
        if self._recalibrate:
            anew = recalibrated(self.edit_set, self._threshold)
            with deferred():
                self._handle.publish(anew)
                self.edit_set, self._recalibrate = anew, False

    # ---------------------------------------------------------------- editing

    def edit(
        self, requests: Sequence[EditRequest], *, progress: bool = True, observer: Observer | None = None
    ) -> Batch:
        """Applies one batch of edits; all of it, or, on any error or interrupt, nothing.

        A request about a fact that the ledger holds (the same prompt, or the same template around the same subject, but
        for whitespace) takes its place: the old edit is taken out first, as `remove` does it, so that target values,
        keys and thresholds are found as if it had never been. What repeats the latest edit of its fact, target,
        paraphrases and all, leaves it where it is.

        Args:
            requests: the facts to change.
            progress: show a bar on stderr.
            observer: called as observer(event, layer, **tensors) with "values" (V), "update" (K as the layer learns it,
                R, X, s, and N, of hard negatives and interfering keys) a layer and "threshold" (value) a layer.

        Raises:
            ValueError: see `request.tokenise_batch`, `optimise`, `KeyMemory.solve`; or the editor was unloaded.
        """
        started = time.monotonic()
        self._handle.check_editable()
        if torch.is_inference_mode_enabled():
            raise ValueError("Editor.edit needs gradients: call it outside torch.inference_mode()")
        check_batch(requests)
        replaced = superseded(self.edit_set, requests)
        tokens = tokenise_batch(
            requests, self.tokenizer, self.edit_set.contexts, context_length(self.model),
            wordings=self._find_wordings, earlier=left_of(self.edit_set, replaced),
        )  # fmt: skip
        if not self.memories:
            self.collect_statistics(progress=progress)
        assert self.statistics is not None
        tell = observer or (lambda *_, **__: None)
        with (
            self._all_or_nothing(),
            frozen(self.model),
            track("editing", len(tokens), "edit", progress) as bar,
        ):
            pad_id, limit = self._pad_id, self.config.pass_tokens
            start, memories = self._without(replaced)
            assignments = assign(start, tokens)
            self._handle.disable()
            tokens = away_from_sinks(
                self.partial, max(part.last for part in assignments), tokens, pad_id=pad_id, max_tokens=limit
            )
            self._handle.enable()  # a new edit goes on top of all earlier ones, whoever has switched them off
            v0 = self._bare_outputs(tokens, assignments)
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
            answers = answers_of(self.partial, tokens, pad_id=pad_id, max_tokens=limit)
            batch = Batch(
                id=of_first_rank(uuid.uuid4().hex[:12]),
                time=of_first_rank(datetime.now(timezone.utc).isoformat(timespec="seconds")),
                outcomes=outcomes_of(tokens, ordered, v0, after, updated.leverages, answers, self.tokenizer),
                seconds=time.monotonic() - started,
                layers=updated.layers,
                thresholds=updated.edits.thresholds,
            )
            gone = removals(self.edit_set, replaced, "superseded", by=batch.id)
            self._commit(updated.edits.with_batch(batch).with_removed(gone), memories)
            cache.discard()
        warn_of_weak(batch.outcomes, self.config)
        return batch

    def _find_wordings(self, requests: Sequence[EditRequest]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Paraphrases and prompts to keep of each request, beside its own."""
        paraphrases, keep = self.config.found_paraphrases, self.config.found_keep
        if paraphrases == keep == 0:
            return [((), ())] * len(requests)
        with self.disabled(), frozen(self.model):
            if self._wordings is None:
                self._wordings = Wordings(self.partial, self.tokenizer, pad_id=self._pad_id)
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

    def _threshold(self, position: int, delta: LowRankDelta, own: Tensor) -> Threshold:
        """τ of the layer for a new delta with the edits' keys `own` [d, N]."""
        if self.statistics is None:  # a saved edit set rolled back before anything was edited
            self.collect_statistics()
        assert self.statistics is not None
        return calibration.calibrate(delta, self.statistics.samples[self.layers[position]], own, self.config)

    def _without(self, replaced: Places) -> tuple[EditSet, list[KeyMemory]]:
        """The edit set, published, and the memories from which a batch starts that takes the place of `replaced`."""
        if not replaced:
            return self.edit_set, self.memories
        memories = memories_without(self.memories, self.edit_set, replaced)
        start = without_requests(self.edit_set, replaced, self._threshold)
        self._handle.publish(start)
        return start, memories

    def _commit(self, edited: EditSet, memories: list[KeyMemory]) -> None:
        """The point of no return: memories, hooks and edit set change together."""
        with deferred(), each_or_none(memories, [update.keys for update in edited.batches[-1].layers]):
            self._handle.publish(edited)
            self.edit_set, self.memories = edited, memories

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        modes = self._handle.modes
        try:
            yield
        finally:
            # After a commit this publishes what is published already; after a failure, the set from before.
            with deferred():
                self._handle.forget_pass()
                self._handle.publish(self.edit_set)
                self._handle.set_modes(modes)

    # ---------------------------------------------------------------- undo, save, switches

    def rollback(self, batch_id: str) -> None:
        """Undoes one batch: afterwards deltas and thresholds are those of the other batches alone. What its edits had
        taken the place of does not come back.

        Raises:
            ValueError: no such batch, or the key memory cannot give up its keys; nothing is changed then.
        """
        self._handle.check_editable()
        places = range(len(self.edit_set.find(batch_id).outcomes))
        self._take_out({batch_id: places}, "rolled back")

    def remove(self, batch_id: str, index: int) -> Removed:
        """Undoes one fact of a batch: afterwards deltas, key memories and thresholds are those of the others alone, as
        docs/method.md section 7 defines it. The last one of a batch takes the batch with it, as `rollback` does.

        Args:
            index: the fact's number in the batch, counted from 0 as the batch was made: others keep theirs.

        Raises:
            TypeError: index is no integer.
            ValueError: no such batch, or no such fact in it any more; an earlier version made the batch and did not
                note enough; or the key memory cannot give up its keys. Nothing is changed then.

        Example:
            >>> editor.remove("1f0c2ab3d4e5", 2).request.target_new
            'Rome'
        """
        self._handle.check_editable()
        self._take_out({batch_id: [self.edit_set.place_of(batch_id, index)]}, "removed")
        return self.edit_set.removed[-1]

    def _take_out(self, places: Places, reason: str) -> None:
        self._settle_thresholds()
        keys = removed_keys(self.edit_set, places)
        rest = without_requests(self.edit_set, places, self._threshold)
        rest = rest.with_removed(removals(self.edit_set, places, reason))
        with deferred(), each_or_none(self.memories, keys, forget=True):
            self._handle.publish(rest)
            self.edit_set = rest

    def _settle_thresholds(self) -> None:
        """Before the edit set is written or taken apart: its thresholds are those that its config asks for."""
        if self._recalibrate:
            self.collect_statistics()

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the edit set (safetensors + JSON). `overwrite`: also over an edit set that this one does not go on
        from, which is a ConflictError otherwise; see `store.save`."""
        self._settle_thresholds()
        store.save(self.edit_set, Path(folder), overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the edit set to the Hugging Face hub; see `store.push_to_hub`."""
        self._settle_thresholds()
        return store.push_to_hub(self.edit_set, repo_id, **options)

    def enable(self) -> None:
        self._handle.enable()

    def disable(self) -> None:
        self._handle.disable()

    def disabled(self) -> Any:
        """Context manager: the base model, bit for bit."""
        return self._handle.disabled()

    def unload(self) -> nn.Module:
        """The untouched model back; the editor is of no use afterwards."""
        return self._handle.unload()
