"""`coachhook log`: the ledger of an edit set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli.common import Report, add_edits

if TYPE_CHECKING:
    from rich.console import Console

NAME = "log"
HELP = "List the batches of an edit set, oldest first; needs no model."
EXAMPLES = """examples:
  coachhook log --edits edits/
  coachhook log --edits edits/ --facts
  coachhook log --edits edits/ --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_edits(parser, required=True)
    parser.add_argument("--facts", action="store_true", help="list every edit, not only the batches")


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest

    manifest = read_manifest(arguments.edits)
    batches = [
        {
            **{name: line[name] for name in ("id", "time", "seconds", "metrics")},
            "edits": [
                {**outcome["request"], "residual_left": outcome["residual_left"]} for outcome in line["outcomes"]
            ],
        }
        for line in manifest["batches"]
    ]
    data = {"model": manifest["model"], "config": manifest["config"], "batches": batches}
    show = _show_facts if arguments.facts else _show_batches
    return Report(data, lambda console: show(console, data))


def _title(data: dict[str, Any]) -> str:
    count = sum(len(batch["edits"]) for batch in data["batches"])
    config = data["config"]
    return f"{count} edits of model {data['model']}, layers {config['layers']}, gate {config['gate']}"


def _show_batches(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table

    from coachhook_fast.cli.terminal import cell

    table = Table("batch", "time", "edits", "seconds", "subjects", title=_title(data), title_justify="left")
    for batch in data["batches"]:
        subjects = cell(", ".join(edit["subject"] for edit in batch["edits"]))
        table.add_row(
            cell(batch["id"]), cell(batch["time"]), str(len(batch["edits"])), f"{batch['seconds']:.1f}", subjects
        )
    console.print(table)


def _show_facts(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from coachhook_fast.cli.terminal import cell

    table = Table("batch", "fact", "residual left", title=_title(data), title_justify="left")
    for batch in data["batches"]:
        for edit in batch["edits"]:
            prompt = edit["prompt"].replace("{}", edit["subject"])
            fact = Text.assemble(cell(prompt), " → ", cell(edit["target_new"], "bold"))
            table.add_row(cell(batch["id"]), fact, f"{edit['residual_left']:.2f}")
    console.print(table)
