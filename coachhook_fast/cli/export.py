"""`coachhook export`: the edits for programs that have no gate, and what they lose by that."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coachhook_fast import files, printable
from coachhook_fast.cli import common
from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

    from coachhook_fast.evaluate import HeldOut

NAME = "export"
HELP = "Write an edit set as a LoRA adapter or a plain checkpoint, without the gate, and measure what that costs."
EXAMPLES = """examples:
  coachhook export edits/ adapter/ --model smollm2 --format peft
  coachhook export edits/ merged/ --model smollm2 --format merged --perplexity wikitext2-valid.raw
  coachhook export edits/ adapter/ --model smollm2 --format peft --max-said-lost 0.2

The edits then act on every token. Before anything is written the model is asked, with the gate and without, for every
fact of the edit set, for other prompts made from it, and for the perplexity of held-out text. Where more is lost than
the limits allow, nothing is written and the exit code is 1. The figures also go into OUT: README.md and
coachhook_export.json.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("edits", type=common.edits_folder, metavar="EDITS", help="folder of a saved edit set, or hf:OWNER/NAME")
    add("out", type=common.folder, metavar="OUT", help="where the export goes: a new folder, or an empty one")
    add("--format", required=True, metavar="F", help="peft: a LoRA adapter; merged: a plain transformers checkpoint")
    common.add_model(parser)
    add("--base-name", metavar="NAME", help="the base model's name in what is written (default: what --model loaded)")
    add("--perplexity", type=Path, metavar="FILE", help="held-out text (default: a short one of the package)")
    add("--max-tokens", type=common.positive, default=20_000, metavar="N", help="tokens of it to use (default 20000)")
    # Their defaults are those of export.Limits, which is not imported for --help; a test compares.
    help_said = "most facts that may be lost, as a share of those said with the gate (default 0.05)"
    add("--max-said-lost", type=float, default=0.05, metavar="X", help=help_said)
    help_others = "most other prompts that may change, as a share of those that the gate keeps (default 0.1)"
    add("--max-others-changed", type=float, default=0.1, metavar="X", help=help_others)
    help_ratio = "most that perplexity may be multiplied with (default 1.05)"
    add("--max-perplexity-ratio", type=float, default=1.05, metavar="X", help=help_ratio)
    add("--force", action="store_true", help="write whatever is lost")


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest
    from coachhook_fast.export import Limits, TooMuchLostError, check_export, default_held_out, export_edits

    limits = Limits(arguments.max_said_lost, arguments.max_others_changed, arguments.max_perplexity_ratio)
    check_export(arguments.out, arguments.format)
    read_manifest(arguments.edits)  # what is no edit set is refused before a model is loaded
    held_out = default_held_out() if arguments.perplexity is None else _held_out(arguments)
    model, tokenizer = common.load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    editor = Editor(model, tokenizer, edits=arguments.edits)
    refused = None
    try:
        losses = export_edits(
            editor,
            arguments.out,
            format=arguments.format,
            held_out=held_out,
            limits=limits,
            force=arguments.force,
            base_name=arguments.base_name,
            progress=True,
        )
    except TooMuchLostError as error:
        losses, refused = error.losses, str(error)
    data = {"out": str(arguments.out), "format": arguments.format, "refused": refused, **losses.to_dict()}
    return Report(data, lambda console: _show(console, data), code=1 if refused else 0)


def _held_out(arguments: argparse.Namespace) -> HeldOut:
    from coachhook_fast.evaluate import HeldOut

    try:
        text = files.read_text(arguments.perplexity, most=files.MOST_FACTS)
    except ValueError as error:
        raise ValueError(f"--perplexity {error}") from error
    return HeldOut(text, max_tokens=arguments.max_tokens)


def _show(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{data['facts']} facts, {data['others']} other prompts"
    table = Table(title=title, title_justify="left")
    table.add_column("served")
    for head in ("facts said", "others as unedited", "perplexity", "ratio"):
        table.add_column(head, justify="right")
    for row in data["ways"]:
        numbers = ["not finite" if row[key] is None else f"{row[key]:.3f}" for key in ("perplexity", "ratio")]
        table.add_row(row["way"], str(row["said"]), str(row["others_as_unedited"]), *numbers)
    console.print(table)
    if data["refused"]:
        line = f"nothing is written: {data['refused']}; --force writes it all the same"
    else:
        line = f"written as {data['format']} in {data['out']}, without the gate"
    console.print(printable.one_line(line), markup=False, soft_wrap=True)
