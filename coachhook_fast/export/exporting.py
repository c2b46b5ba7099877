"""The whole of an export: looked at, measured, and written unless too much would be lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coachhook_fast import files
from coachhook_fast.editing.editor import Editor
from coachhook_fast.evaluate.metrics import HeldOut
from coachhook_fast.export.adapter import changed_layers, write_adapter
from coachhook_fast.export.card import card
from coachhook_fast.export.losses import ExportLosses, Limits, TooMuchLostError, default_held_out, measure_losses
from coachhook_fast.export.merge import check_mergeable, write_merged

FORMATS = ("peft", "merged")
RECORD, CARD = "coachhook_export.json", "README.md"


def export_edits(
    editor: Editor,
    folder: str | Path,
    *,
    format: str,
    held_out: HeldOut | None = None,
    limits: Limits | None = None,
    force: bool = False,
    base_name: str | None = None,
    progress: bool = False,
) -> ExportLosses:
    """Writes the edits for programs that have no gate, after measuring what they lose by that. Returns the losses,
    which are also written beside the rest: `coachhook_export.json`, and `README.md` for people.

    Args:
        editor: with the edits; it is afterwards as before, and nobody else may run its model meanwhile.
        folder: where to; must not be there, or be empty. It appears whole or not at all.
        format: "peft", a LoRA adapter, or "merged", a plain transformers checkpoint.
        held_out: text for perplexity; None takes `default_held_out()`.
        limits: the most that may be lost; None takes those of `Limits()`.
        force: write whatever is lost.
        base_name: the base model's name for whoever loads the export; None takes what the model was loaded from.

    Raises:
        TooMuchLostError: more would be lost than was allowed; nothing is written.
        ValueError: an argument is none that is described here, there are no edits, or they do not go into the format
            (see `changed_layers`, `check_mergeable`); nothing is written.
        OSError: the folder cannot be written; nothing of it is left.

    Examples:
        >>> losses = export_edits(Editor(model, tokenizer, edits="edits/"), "adapter/", format="peft")
        >>> losses.said_lost, losses.perplexity_ratio
        (0.0, 1.0021)
    """
    folder = Path(folder)
    check_export(folder, format)
    model, edit_set = editor.model, editor.edit_set
    rank = 0
    if format == "peft":  # what writing would refuse is refused before an hour of measuring
        rank = max(layer.delta.rank for layer in changed_layers(model, edit_set))
    else:
        check_mergeable(model)
    losses = measure_losses(editor, format, held_out or default_held_out(), progress=progress)
    forced = False
    try:
        losses.check(limits or Limits())
    except TooMuchLostError:
        if not force:
            raise
        forced = True
    loaded: Any = model
    name = base_name or str(getattr(loaded, "name_or_path", "") or "")
    record = {
        "format": format,
        "base": name,
        "base_fingerprint": edit_set.model,
        "layers": list(edit_set.layers),
        "batches": [batch.id for batch in edit_set.batches],
        "forced": forced,
        **losses.to_dict(),
    }
    with files.new_folder(folder) as staging:
        if format == "peft":
            write_adapter(model, edit_set, staging, base_name=name)
        else:
            write_merged(model, editor.tokenizer, staging)
        (staging / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page = card(format, name, losses.to_dict(), rank=rank, forced=forced)
        (staging / CARD).write_text(page, encoding="utf-8")
    return losses


def check_export(folder: str | Path, format: str) -> None:
    """ValueError for what `export_edits` would refuse without looking at the model."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    files.check_new_folder(Path(folder))
