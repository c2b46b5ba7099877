"""The methods of the quality table, ours and the others', behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from baselines.alphaedit import AlphaEdit
from baselines.finetune import FineTune
from baselines.memit import Memit
from baselines.published_coachhook_flow import PublishedFlow

from coachhook_fast import EditConfig, Editor, EditRequest
from coachhook_fast.config import PAPER
from coachhook_fast.editing.calibration import measure

QUANTILES = {"min": 0.0, "05": 0.05, "50": 0.5, "95": 0.95, "999": 0.999, "max": 1.0}


class Runner(Protocol):
    """A method at work on a model: applies batches, saves, goes on."""

    def edit(self, requests: Sequence[EditRequest]) -> Any: ...

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...

    def unload(self) -> Any: ...


class Ours:
    """The package's editor."""

    def __init__(self, model: Any, tokenizer: Any, config: EditConfig, corpus: Any) -> None:
        self.model, self.tokenizer, self.corpus = model, tokenizer, corpus
        self.editor = Editor(model, tokenizer, config)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        self._with_statistics().edit(requests, progress=False)

    def _with_statistics(self) -> Editor:
        if self.editor.statistics is None:
            self.editor.collect_statistics(self.corpus, progress=False)
        return self.editor

    def save(self, folder: Path) -> None:
        self.editor.save_pretrained(folder, overwrite=True)  # of a run that was interrupted

    def restore(self, folder: Path) -> None:
        self.editor.unload()
        self.editor = Editor(self.model, self.tokenizer, edits=folder)

    def unload(self) -> None:
        self.editor.unload()

    def separation(self) -> list[dict[str, float]]:
        """How far the edit keys stand from ordinary text in each layer: z of what the gate measures against the
        sample of corpus keys; and what share of that sample the `calibrated` gate lets through."""
        editor = self._with_statistics()
        assert editor.statistics is not None
        edits, figures = editor.edit_set, []
        for position, layer in enumerate(edits.layers):
            delta, relative = edits.deltas[position], bool(edits.config.threshold_relative)
            ordinary = measure(delta, editor.statistics.samples[layer].to(delta.device), relative)
            mean, std = ordinary.mean(), ordinary.std()
            keys = edits.edit_keys(position)
            if keys.shape[1] == 0:  # no batch has edited this layer yet
                figures.append({})
                continue
            own = (measure(delta, keys.T.to(ordinary), relative) - mean) / std
            z = (ordinary - mean) / std
            found = {f"own_z_{name}": float(own.quantile(share)) for name, share in QUANTILES.items()}
            found |= {f"ordinary_z_{name}": float(z.quantile(share)) for name, share in QUANTILES.items()}
            if edits.config.gate == "calibrated":
                tau = edits.thresholds[position].value
                found |= {
                    "threshold_z": float((tau - mean) / std),
                    "fire_rate": float((ordinary >= tau).double().mean()),
                }
            figures.append(found)
        return figures


class Unedited:
    """No method: what the table's columns are before any edit."""

    def __init__(self, model: Any, tokenizer: Any, config: EditConfig, corpus: Any) -> None:
        pass

    def edit(self, requests: Sequence[EditRequest]) -> None:
        pass

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def restore(self, folder: Path) -> None:
        pass

    def unload(self) -> None:
        pass


@dataclass(frozen=True)
class Method:
    """A line of the table.

    Attributes:
        settings: what differs from the run's EditConfig.
        ungated: evaluated with every hook applied to every token; the edits are those of the gated run.
    """

    name: str
    gate: str
    make: Callable[[Any, Any, EditConfig, Any], Runner]
    settings: tuple[tuple[str, Any], ...] = ()
    ungated: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}/{self.gate}"


# The others' own settings of target values and contexts, which those of MEMIT and AlphaEdit share with CoachHooK's.
# λ is the run's: the paper's suits wider models, and the table's gates are named below.
AS_PUBLISHED = tuple(
    (name, value) for name, value in PAPER.items() if name not in ("gate", "alpha", "mom2_update_weight")
)

METHODS = (
    Method("coachhook-fast", "calibrated", Ours),
    Method("coachhook-fast", "sequence", Ours, (("gate", "sequence"),)),
    Method("coachhook-fast", "none", Ours, ungated=True),
    Method("published", "published", PublishedFlow, AS_PUBLISHED),
    Method("memit", "none", Memit, AS_PUBLISHED),
    Method("alphaedit", "none", AlphaEdit, AS_PUBLISHED),
    Method("finetune", "none", FineTune),
    Method("unedited", "none", Unedited),
)
