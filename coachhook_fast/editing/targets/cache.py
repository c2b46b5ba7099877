"""Target values found before an interruption: kept on disk until their batch is committed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from coachhook_fast.editing.targets.optimise import Target
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.models.distributed import ranks
from coachhook_fast.models.loading import cache_dir
from coachhook_fast.request import TokenisedRequest


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
            "batches": [done.id for done in edit_set.batches],
            "requests": [(t.request.text, t.request.subject, t.request.target_new, t.bare.lookup) for t in batch],
        }
        name = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        self.path: Path = cache_dir() / "targets" / f"{name}.safetensors"
        self.found: dict[int, Target] = {}
        self._alone = ranks()[1] == 1
        if self._alone and self.path.is_file():
            try:
                tensors = load_file(self.path)
            except SafetensorError:  # a disk that was full: the targets are found anew
                return
            for name, value in tensors.items():
                if name.startswith("value."):
                    loss, steps = tensors[f"run.{name[6:]}"].tolist()
                    self.found[int(name[6:])] = Target(value, loss, int(steps))

    def keep(self, targets: dict[int, Target]) -> None:
        """Adds targets and writes the file anew."""
        if not self._alone:
            return
        self.found |= targets
        tensors = {f"value.{index}": target.value.cpu().contiguous() for index, target in self.found.items()}
        for index, target in self.found.items():
            tensors[f"run.{index}"] = torch.tensor([target.loss, target.steps], dtype=torch.float64)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, staging)
        staging.replace(self.path)

    def discard(self) -> None:
        """Removes the file: the batch is committed."""
        if self._alone:
            self.path.unlink(missing_ok=True)
