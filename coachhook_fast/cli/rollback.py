"""`coachhook rollback`: undo a batch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast.cli.common import Report, add_edits, add_model, load_model
from coachhook_fast.cli.edit import output_folder

if TYPE_CHECKING:
    from rich.console import Console

NAME = "rollback"
HELP = "Undo one batch of an edit set: what is left is that of the other batches alone."
EXAMPLES = """examples:
  coachhook log --edits edits/                                   # which batch?
  coachhook rollback --model smollm2 --edits edits/ 1f0c2ab3d4e5
  coachhook rollback --model smollm2 --edits edits/ --out without/ 1f0c2ab3d4e5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=True)
    parser.add_argument("batch", metavar="BATCH", help="id of the batch, as coachhook log lists it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the rest goes (default: the same folder)")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="the text that the edits' statistics came from")


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest

    out = output_folder(arguments.out, arguments.edits)
    known = [batch["id"] for batch in read_manifest(arguments.edits)["batches"]]
    if arguments.batch not in known:
        raise ValueError(f"BATCH {arguments.batch!r} is not in the ledger of {arguments.edits}, which holds {known}")
    model, tokenizer = load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    editor = Editor(model, tokenizer, edits=arguments.edits)
    editor.collect_statistics(arguments.corpus)
    removed = len(editor.edit_set.find(arguments.batch).requests)
    editor.rollback(arguments.batch)
    editor.save_pretrained(out)
    left = [batch.id for batch in editor.ledger]
    data = {"removed": arguments.batch, "removed_edits": removed, "batches": left, "out": str(out)}

    def show(console: Console) -> None:
        line = f"removed batch {arguments.batch} with {removed} edits; {len(left)} batches are left in {out}"
        console.print(line, markup=False, soft_wrap=True)

    return Report(data, show)
