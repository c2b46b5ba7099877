"""`coachhook edit`: facts into an edit set, batch by batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli import common
from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

    from coachhook_fast.editing.editor import Editor
    from coachhook_fast.edits.edit_set import Batch, EditOutcome
    from coachhook_fast.evaluate.datasets import EditRecord
    from coachhook_fast.request import EditRequest

NAME = "edit"
HELP = "Edit facts into a model, in consecutive batches; the base weights stay as they are."
EXAMPLES = """examples:
  coachhook edit --model smollm2 --facts examples/facts.jsonl --batch-size 8 --out edits/
  coachhook edit --model smollm2 --facts more.jsonl --batch-size 8 --edits edits/
  coachhook edit --model smollm2 --facts counterfact-edit.json --limit 30 --batch-size 10 --out cf/ \\
      --layers 4-8 --gate sequence --set mom2_update_weight=400 --set v_num_grad_steps=20
  coachhook edit --model ./gpt-j --facts zsre.json --config EasyEdit/hparams/MEMIT/gpt-j-6B.yaml --out zsre/

The edit set is saved after every batch. With --edits the run goes on from a saved set (into the same folder unless
--out names another) and passes over facts that it holds already: an interrupted run goes on with --edits OUT.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model(parser)
    common.add_facts(parser)
    parser.add_argument(
        "--batch-size", type=common.positive, default=10, metavar="N", help="edits a batch (default 10)"
    )
    parser.add_argument("--out", type=common.folder, metavar="DIR", help="where the edit set goes")
    common.add_edits(parser, required=False, hub=False)
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="text for the key statistics (see coachhook stats)")
    common.add_config(parser)


def run(arguments: argparse.Namespace) -> Report:
    out = output_folder(arguments.out, arguments.edits)
    config = common.load_config(arguments, edits=arguments.edits)
    records, skipped = common.load_records(arguments)
    model, tokenizer = common.load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    editor = Editor(model, tokenizer, config, edits=arguments.edits)
    records = _editable(records, editor, skipped if arguments.skip_invalid else None)
    if not records:
        raise ValueError(f"{arguments.facts} holds no fact that this model can take")
    requests = _not_yet_edited(records, editor)
    held = len(records) - len(requests)
    if held:
        common.note(f"{held} of {len(records)} facts are edited already")
    size = arguments.batch_size
    planned = [requests[start : start + size] for start in range(0, len(requests), size)]
    for number, batch in enumerate(planned, 1):
        _check(f"batch {number}", batch, editor)
    if planned:
        editor.collect_statistics(arguments.corpus)
    else:  # --out may be another folder than --edits
        editor.save_pretrained(out)
    batches = []
    for number, batch in enumerate(planned, 1):
        common.note(f"batch {number} of {len(planned)}")
        batches.append(editor.edit(batch))
        editor.save_pretrained(out)
    return _report(out, editor, batches, held, skipped)


def output_folder(out: Path | None, edits: Path | None) -> Path:
    """Where to save; never over an edit set that the run does not go on from."""
    from coachhook_fast.edits.manifest import MANIFEST

    folder = out or edits
    if folder is None:
        raise ValueError("--out DIR is needed (or --edits DIR to go on from a saved edit set)")
    goes_on = edits is not None and folder.resolve() == edits.resolve()
    if (folder / MANIFEST).exists() and not goes_on:
        raise ValueError(
            f"--out {folder} holds an edit set already: go on from it with --edits, or name another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is not a folder")
    return folder


def _check(what: str, requests: Sequence[EditRequest], editor: Editor) -> None:
    """ValueError that begins with `what` unless `Editor.edit` would take `requests` as a batch."""
    from coachhook_fast.models.loading import context_length
    from coachhook_fast.request import tokenise_batch

    try:
        tokenise_batch(requests, editor.tokenizer, editor.edit_set.contexts, context_length(editor.model))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _editable(records: Sequence[EditRecord], editor: Editor, skipped: list[str] | None) -> list[EditRecord]:
    """The records that this model can take; others go to `skipped`, where that is None the first raises ValueError."""
    kept = []
    for record in records:
        try:  # by its id: records that are no valid edit have been left out before, so places do not tell
            _check(f"the fact of case {record.request.case_id}", [record.request], editor)
        except ValueError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            common.note(f"left out {error}")
        else:
            kept.append(record)
    return kept


def _not_yet_edited(records: Sequence[EditRecord], editor: Editor) -> list[EditRequest]:
    """The requests that are left to do: of those about one prompt, the ones after its latest edit."""
    latest = {request.text: request.target_new for batch in editor.ledger for request in batch.requests}
    left: list[EditRequest] = []
    done: set[str] = set()
    for request in reversed([record.request for record in records]):
        if latest.get(request.text) == request.target_new:
            done.add(request.text)  # with it, all before it
        if request.text not in done:
            left.append(request)
    return left[::-1]


def _report(out: Path, editor: Editor, batches: Sequence[Batch], held: int, skipped: Sequence[str]) -> Report:
    edits = [_edit_line(batch, outcome) for batch in batches for outcome in batch.outcomes]
    seconds = sum(batch.seconds for batch in batches)
    data = {
        "out": str(out),
        "layers": list(editor.layers),
        "config": editor.config.to_dict(),
        "batches": [
            {"id": batch.id, "seconds": round(batch.seconds, 3), "edits": len(batch.outcomes)} for batch in batches
        ],
        "edits": edits,
        "already_edited": held,
        "skipped": list(skipped),
        "seconds_per_edit": round(seconds / len(edits), 3) if edits else None,
    }

    def show(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        from coachhook_fast.cli.terminal import cell
        from coachhook_fast.editing.outcomes import RESIDUAL_LEFT_LIMIT

        table = Table()
        for head in ("batch", "subject", "new answer"):
            table.add_column(head, overflow="fold")
        for head in ("loss", "steps", "least leverage", "residual left"):
            table.add_column(head, justify="right")
        for line in edits:
            numbers = [f"{line['loss']:.3f}", str(line["steps"]), f"{min(line['leverage']):.2f}"]
            left = Text(
                f"{line['residual_left']:.2f}", style="red" if line["residual_left"] > RESIDUAL_LEFT_LIMIT else ""
            )
            table.add_row(line["batch"], cell(line["subject"]), cell(line["target_new"]), *numbers, left)
        if edits:
            console.print(table)
        rate = f", {seconds / len(edits):.2f} s an edit" if edits else ""
        console.print(f"{len(edits)} edits in {len(batches)} batches{rate}; saved in {out}", markup=False)

    return Report(data, show)


def _edit_line(batch: Batch, outcome: EditOutcome) -> dict[str, Any]:
    return {
        "batch": batch.id,
        "case_id": outcome.request.case_id,
        "subject": outcome.request.subject,
        "target_new": outcome.request.target_new,
        "loss": outcome.loss,
        "steps": outcome.steps,
        "leverage": list(outcome.leverage),
        "residual_left": outcome.residual_left,
        "in_context_only": outcome.in_context_only,
    }
