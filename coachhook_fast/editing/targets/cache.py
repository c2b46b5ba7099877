"""Target values found before an interruption: kept on disk until their batch is committed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from coachhook_fast.editing.targets.kept import discard_targets, read_targets, write_targets
from coachhook_fast.editing.targets.optimise import Target
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.models.distributed import ranks
from coachhook_fast.models.loading import cache_dir
from coachhook_fast.request import TokenisedRequest, TokenRow


class TargetCache:
    """The targets of one batch on one state of the edits; another batch or state has a file of its own.

    Under torchrun nothing is kept: each rank finds a share, and all must agree on what is still to be found.

    Attributes:
        found: targets by position in the batch.
    """

    def __init__(self, edit_set: EditSet, batch: list[TokenisedRequest]) -> None:
        description: dict[str, Any] = {
            "model": edit_set.model,
            "config": edit_set.config.to_dict(),
            "contexts": edit_set.contexts,
            # Ids alone would not tell: a batch keeps its own when it loses a request.
            "batches": [(done.id, [request.text for request in done.requests]) for done in edit_set.batches],
            "requests": [
                (
                    *(t.request.text, t.request.subject, t.request.target_new, t.bare.lookup),
                    *map(_ids, (*t.paraphrases, *t.keep, *t.held)),
                )
                for t in batch
            ],
        }
        name = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        self.path: Path = cache_dir() / "targets" / f"{name}.safetensors"
        self.found: dict[int, Target] = {}
        self._alone = ranks()[1] == 1
        if self._alone:
            self.found = read_targets(self.path, edit_set.deltas[0].out_features, len(batch))

    def keep(self, targets: dict[int, Target]) -> None:
        """Adds targets and writes the file anew."""
        if self._alone:
            self.found |= targets
            write_targets(self.path, self.found)

    def discard(self) -> None:
        """Removes the file: the batch is committed."""
        if self._alone:
            discard_targets(self.path)


def _ids(row: TokenRow) -> list[int]:
    return [*row.prompt, row.lookup]
