"""EditedModel: a model with its hooks, its edit set and its key memories; all of an editor but the editing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.config import EditConfig
from coachhook_fast.editing import calibration
from coachhook_fast.editing.contexts import write_contexts
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.memories import each_or_none, memories_of
from coachhook_fast.editing.outcomes import EditWarning
from coachhook_fast.editing.said import FactCheck, check_facts
from coachhook_fast.editing.single_facts import Places, removals
from coachhook_fast.editing.targets.wordings import Wordings
from coachhook_fast.edits import store
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditSet, Removed
from coachhook_fast.edits.removal import recalibrated, removed_keys, without_requests
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks, checked_layers
from coachhook_fast.hooks.load_edits import read_edits
from coachhook_fast.interrupts import deferred
from coachhook_fast.limits import check_bounds
from coachhook_fast.model_defaults import default_layers
from coachhook_fast.models.architectures import down_projection_size, layout_of
from coachhook_fast.models.loading import identified
from coachhook_fast.models.passes.budget import TokenBudget
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.models.residual import check_residual
from coachhook_fast.models.wrappers import base_to_edit, check_no_adapters
from coachhook_fast.statistics.cache import model_statistics
from coachhook_fast.statistics.corpus import Corpus
from coachhook_fast.statistics.key_statistics import KeyStatistics

BeforeCommit = Callable[[EditSet], None]


class EditedModel:
    """What `Editor` stands on; made by it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: EditConfig | None = None,
        *,
        edits: str | Path | None = None,
    ) -> None:
        model = base_to_edit(model)
        saved = None if edits is None else read_edits(model, edits)
        config = config or (saved.config if saved else EditConfig())
        check_bounds(config)
        layout = layout_of(
            model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp
        )
        self.model, self.tokenizer = model, tokenizer
        self.partial = PartialModel(model, layout)
        num_layers = len(self.partial.blocks)
        typical = min((config.layers or default_layers(num_layers))[0], num_layers - 1)
        out_features, self.key_dim = down_projection_size(layout.down_projection(model, typical))
        config = config.resolved(num_layers, self.key_dim)
        assert config.layers is not None
        layers = config.layers
        self.partial.gain = check_residual(self.partial, checked_layers(model, layout, layers))
        self._handle = Hooks(model, layout, layers, config.gate)
        self._recalibrate = False  # thresholds of loaded edits are of other settings than config's
        try:
            self._check_devices()
            self.model_id, parts = identified(model)
            if saved is not None:
                store.check_continues(saved, self.model_id, parts, config)
                self.edit_set = replace(saved, config=config)
                self._recalibrate = bool(saved.batches) and config.calibrates_otherwise(saved.config)
            else:
                empty = LowRankDelta.zeros(out_features, self.key_dim, dtype=self.dtype, device=self.partial.device)
                with frozen(model):
                    contexts = write_contexts(model, tokenizer, config)
                start = Threshold(config.alpha if config.gate == "sequence" else float("inf"))
                each = (empty,) * len(layers), (start,) * len(layers)
                self.edit_set = EditSet(self.model_id, config, contexts, *each, base=parts)
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
        check_no_adapters(self.model)
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
        memories = memories_of(self.edit_set, statistics, self.partial.device)
        self.statistics, self.memories = statistics, memories
        self.edit_set = replace(self.edit_set, statistics=statistics.run)
        if self._recalibrate:
            anew = recalibrated(self.edit_set, self._threshold)
            with deferred():
                self._handle.publish(anew)
                self.edit_set, self._recalibrate = anew, False

    def _threshold(self, position: int, delta: LowRankDelta, own: Tensor) -> Threshold:
        """τ of the layer for a new delta with the edits' keys `own` [d, N]."""
        if self.statistics is None:  # a saved edit set rolled back before anything was edited
            self.collect_statistics()
        assert self.statistics is not None
        return calibration.calibrate(delta, self.statistics.samples[self.layers[position]], own, self.config)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        self._handle.check_editable()
        try:
            yield
        finally:
            # After a commit this publishes what is published already; after a failure, the set from before.
            with deferred():
                self._handle.forget_pass()
                self._handle.publish(self.edit_set)
                self._handle.force_modes(None)

    # ---------------------------------------------------------------- what it says

    def check(self, *, mode: str = "gated") -> list[FactCheck]:
        """Asks the edited model for every fact of the ledger, oldest first: greedily, in the bare prompt and in the
        paraphrases of its request.

        Args:
            mode: of the edits meanwhile, whoever has switched them off: "gated", "always" (as if there were no gate) or
                "off" (the base model).

        Raises:
            ValueError: the editor was unloaded, or there is no such mode.

        Examples:
            >>> [fact.request.text for fact in editor.check() if not fact.said]
            ['The capital of Peru is']
        """
        self._handle.check_editable()
        limits = {"pad_id": self._pad_id, "max_tokens": self.config.pass_tokens}
        with self._all_or_nothing(), frozen(self.model):
            self._handle.force_modes([mode] * len(self.hooks))
            return check_facts(self.partial, self.tokenizer, self.edit_set, **limits)

    # ---------------------------------------------------------------- undo, save, switches

    def rollback(self, batch_id: str, *, before_commit: BeforeCommit | None = None) -> None:
        """Undoes one batch: afterwards deltas and thresholds are those of the other batches alone. What its edits had
        taken the place of does not come back.

        Args:
            before_commit: as for `Editor.edit`.

        Raises:
            ValueError: no such batch, or the key memory cannot give up its keys; nothing is changed then.
        """
        self._handle.check_editable()
        places = range(len(self.edit_set.find(batch_id).outcomes))
        self._take_out({batch_id: places}, "rolled back", before_commit)

    def remove(self, batch_id: str, index: int, *, before_commit: BeforeCommit | None = None) -> Removed:
        """Undoes one fact of a batch: afterwards deltas, key memories and thresholds are those of the others alone, as
        docs/method.md section 7 defines it. The last one of a batch takes the batch with it, as `rollback` does.

        Args:
            index: the fact's number in the batch, counted from 0 as the batch was made: others keep theirs.
            before_commit: as for `Editor.edit`.

        Raises:
            TypeError: index is no integer.
            ValueError: no such batch, or no such fact in it any more; an earlier version made the batch and did not
                note enough; or the key memory cannot give up its keys. Nothing is changed then.

        Examples:
            >>> editor.remove("1f0c2ab3d4e5", 2).request.target_new
            'Rome'
        """
        self._handle.check_editable()
        self._take_out({batch_id: [self.edit_set.place_of(batch_id, index)]}, "removed", before_commit)
        return self.edit_set.removed[-1]

    def restore(self, edit_set: EditSet) -> None:
        """Goes back to `edit_set`, one that this editor had, with all that was edited or removed since undone; what a
        rollback of a batch cannot do that took another's place. The key memories are made anew.

        Raises:
            ValueError: an edit set of another model or with other settings; nothing is changed then.

        Examples:
            >>> before = editor.edit_set
            >>> editor.edit(requests)
            >>> editor.restore(before)
        """
        self._handle.check_editable()
        if edit_set.model != self.model_id or edit_set.config != self.config:
            raise ValueError("edit_set is none that this editor had: it is of another model or has other settings")
        memories = [] if self.statistics is None else memories_of(edit_set, self.statistics, self.partial.device)
        with deferred():
            self._handle.publish(edit_set)
            self.edit_set, self.memories = edit_set, memories

    def _take_out(self, places: Places, reason: str, before: BeforeCommit | None) -> None:
        self._settle_thresholds()
        keys = removed_keys(self.edit_set, places)
        rest = without_requests(self.edit_set, places, self._threshold)
        rest = rest.with_removed(removals(self.edit_set, places, reason))
        with deferred(), each_or_none(self.memories, keys, forget=True):
            if before is not None:
                before(rest)
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
