"""What edits lose with their gate: facts that are no longer said, other prompts that change, and held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coachhook_fast import files
from coachhook_fast.editing.editor import Editor
from coachhook_fast.evaluate.generation import continue_greedily
from coachhook_fast.evaluate.metrics import HeldOut
from coachhook_fast.export.merge import merged
from coachhook_fast.export.others import other_prompts
from coachhook_fast.models.passes.forward import frozen
from coachhook_fast.request import prompt_ids

Ids = tuple[int, ...]

_MOST_TOKENS = 20_000  # as `coachhook eval --perplexity`
_TEXT = Path(__file__).with_name("held_out.txt")


@dataclass(frozen=True)
class Limits:
    """The most that an export may lose.

    Attributes:
        said_lost: share of the facts said with the gate that are no longer said.
        others_changed: share of the other prompts answered as unedited with the gate that no longer are.
        perplexity_ratio: perplexity of what is written over the unedited model's.

    Raises:
        ValueError: a share is not from 0 to 1, or the ratio is no positive number.
    """

    said_lost: float = 0.05
    others_changed: float = 0.1
    perplexity_ratio: float = 1.05

    def __post_init__(self) -> None:
        for name in ("said_lost", "others_changed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.perplexity_ratio < math.inf:
            raise ValueError(f"perplexity_ratio must be a positive number, got {self.perplexity_ratio}")


class TooMuchLostError(ValueError):
    """An export would lose more than was allowed; nothing was written. `losses` has all figures."""

    def __init__(self, message: str, losses: ExportLosses) -> None:
        super().__init__(message)
        self.losses = losses


@dataclass(frozen=True)
class Served:
    """What the model does in one way of serving the edits.

    Attributes:
        said: of each fact of the ledger, oldest first, whether it is said (`Editor.check`).
        others: the first token that it answers to each of `other_prompts`; none where it ends the text.
        perplexity: on the held-out text.
    """

    said: tuple[bool, ...]
    others: tuple[Ids, ...]
    perplexity: float


@dataclass(frozen=True)
class ExportLosses:
    """The edits in the ways in which they can be served.

    Attributes:
        unedited: the base model; gated: as the package serves them; ungated: Δ for every token.
        merged: W + Δ as rounded weights, where these are in half precision and to be written; else None, for they are
            what `ungated` is.
    """

    unedited: Served
    gated: Served
    ungated: Served
    merged: Served | None = None

    @property
    def exported(self) -> Served:
        """What is written."""
        return self.merged or self.ungated

    @property
    def said_lost(self) -> float:
        """Share of the facts said with the gate that are not said by what is written; 0 where none was said."""
        return _lost(self.gated.said, self.exported.said)

    @property
    def others_changed(self) -> float:
        """Share of the other prompts answered as unedited with the gate that what is written answers otherwise."""
        return _lost(self._as_unedited(self.gated), self._as_unedited(self.exported))

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of what is written over the unedited model's, as `coachhook eval` gives it."""
        return self.exported.perplexity / self.unedited.perplexity

    def check(self, limits: Limits) -> None:
        """TooMuchLostError that names every limit which is passed."""
        found = {name: getattr(self, name) for name in ("said_lost", "others_changed", "perplexity_ratio")}
        wrong = [
            f"{name} is {value:.3f} (at most {getattr(limits, name)})"
            for name, value in found.items()
            if not value <= getattr(limits, name)  # NaN is no ratio either
        ]
        if wrong:
            raise TooMuchLostError(f"too much is lost without the gate: {', '.join(wrong)}", self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each way: `way, said, others_as_unedited, perplexity, ratio`; the last two None where they are no
        numbers that JSON has."""
        ways = {"unedited": self.unedited, "gated": self.gated, "ungated": self.ungated, "merged": self.merged}
        return [
            {
                "way": name,
                "said": sum(served.said),
                "others_as_unedited": sum(self._as_unedited(served)),
                "perplexity": _number(served.perplexity),
                "ratio": _number(served.perplexity / self.unedited.perplexity),
            }
            for name, served in ways.items()
            if served is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "facts": len(self.gated.said),
            "others": len(self.gated.others),
            "said_lost": self.said_lost,
            "others_changed": self.others_changed,
            "perplexity_ratio": _number(self.perplexity_ratio),
            "ways": self.rows(),
        }

    def _as_unedited(self, served: Served) -> list[bool]:
        return [one == base for one, base in zip(served.others, self.unedited.others, strict=True)]


def measure_losses(editor: Editor, format: str, held_out: HeldOut, *, progress: bool = False) -> ExportLosses:
    """Asks the model for every fact of the ledger, other prompts and its perplexity: unedited, gated, ungated; for the
    format "merged" in half precision also with W + Δ rounded, since Δ is small beside W and may be lost in that.

    Args:
        editor: with the edits; it is afterwards as before, and nobody else may run its model meanwhile.

    Raises:
        ValueError: the editor was unloaded, the text has fewer than two tokens, or W + Δ cannot be made.
    """
    requests = [request for batch in editor.ledger for request in batch.requests]
    prompts = [tuple(prompt_ids(editor.tokenizer, text)) for text in other_prompts(requests)]
    unedited, gated, ungated = (
        _serve(editor, mode, prompts, held_out, progress) for mode in ("off", "gated", "always")
    )
    rounded = None
    if format == "merged" and any(torch.finfo(hook.base.weight.dtype).bits < 32 for hook in editor.hooks):
        with merged(editor.model):
            rounded = _serve(editor, "off", prompts, held_out, progress)
    return ExportLosses(unedited, gated, ungated, rounded)


def default_held_out() -> HeldOut:
    """A text of the package's own, some 1 100 tokens of plain prose: short, so that it costs little. Give one of the
    kind that the model serves where that matters."""
    return HeldOut(files.read_text(_TEXT, most=files.MiB), max_tokens=_MOST_TOKENS)


def _serve(editor: Editor, mode: str, prompts: Sequence[Ids], held_out: HeldOut, progress: bool) -> Served:
    said = tuple(fact.said for fact in editor.check(mode=mode))
    model = editor.model
    with _forced(editor, mode), frozen(model):
        others = continue_greedily(model, prompts, [1] * len(prompts), description="other prompts", progress=progress)
        return Served(said, tuple(others), held_out.perplexity(model, editor.tokenizer, progress=progress))


@contextmanager
def _forced(editor: Editor, mode: str) -> Iterator[None]:
    handle: Any = editor.model.coachhook
    handle.force_modes([mode] * len(handle.hooks))
    try:
        yield
    finally:
        handle.force_modes(None)


def _lost(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Share of what was True before that no longer is; 0 where nothing was."""
    lost = sum(one and not other for one, other in zip(before, after, strict=True))
    return lost / max(1, sum(before))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
