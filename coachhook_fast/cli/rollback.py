"""`coachhook rollback`: undo a batch, or one fact of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast import printable
from coachhook_fast.cli.common import Report, add_edits, add_model, folder, load_model
from coachhook_fast.cli.edit import output_folder

if TYPE_CHECKING:
    from rich.console import Console

NAME = "rollback"
HELP = "Undo one batch of an edit set, or one fact of it: what is left is that of the others alone."
EXAMPLES = """examples:
  coachhook log --edits edits/                                   # which batch?
  coachhook rollback --model smollm2 --edits edits/ 1f0c2ab3d4e5
  coachhook rollback --model smollm2 --edits edits/ --out without/ 1f0c2ab3d4e5
  coachhook log --edits edits/ --facts                           # which fact of the batch?
  coachhook rollback --model smollm2 --edits edits/ 1f0c2ab3d4e5 --request 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=True, hub=False)
    parser.add_argument("batch", metavar="BATCH", help="id of the batch, as coachhook log lists it")
    parser.add_argument(
        "--request",
        type=request_number,
        metavar="N",
        help="only this one of the batch, by its number in log --facts",
    )
    parser.add_argument("--out", type=folder, metavar="DIR", help="where the rest goes (default: the same folder)")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="the text that the edits' statistics came from")


def request_number(text: str) -> int:
    """argparse type: a number from 0 on."""
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest

    out = output_folder(arguments.out, arguments.edits)
    known = [batch["id"] for batch in read_manifest(arguments.edits)["batches"]]
    if arguments.batch not in known:
        raise ValueError(f"BATCH {arguments.batch!r} is not in the ledger of {arguments.edits}, which holds {known}")
    if arguments.request is not None:
        from coachhook_fast.edits import store

        store.load(arguments.edits, updates=False).place_of(arguments.batch, arguments.request)  # before a model is
    model, tokenizer = load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    editor = Editor(model, tokenizer, edits=arguments.edits)
    editor.collect_statistics(arguments.corpus)
    before = len(editor.edit_set.removed)
    if arguments.request is None:
        editor.rollback(arguments.batch)
    else:
        editor.remove(arguments.batch, arguments.request)
    editor.save_pretrained(out)
    left = [batch.id for batch in editor.ledger]
    gone = editor.edit_set.removed[before:]
    data = {
        "removed": arguments.batch,
        "removed_edits": len(gone),
        "requests": [one.index for one in gone],
        "batches": left,
        "out": str(out),
    }

    def show(console: Console) -> None:
        if arguments.request is None:
            what = f"removed batch {arguments.batch} with {len(gone)} edits"
        else:
            request = gone[0].request
            what = f"removed {request.text!r} -> {request.target_new!r} from batch {arguments.batch}"
        line = f"{what}; {len(left)} batches are left in {out}"
        console.print(printable.one_line(line), markup=False, soft_wrap=True)

    return Report(data, show)
