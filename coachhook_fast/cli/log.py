"""`coachhook log`: the ledger of an edit set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli.common import Report, add_edits

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NAME = "log"
HELP = "List the batches of an edit set, oldest first, and what was removed; needs no model."
EXAMPLES = """examples:
  coachhook log --edits edits/
  coachhook log --edits edits/ --facts
  coachhook log --edits edits/ --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_edits(parser, required=True)
    parser.add_argument(
        "--facts",
        action="store_true",
        help="list every edit with its number, and every removed one, not only batches",
    )


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import numbers_in, read_manifest

    manifest = read_manifest(arguments.edits)
    removed = manifest.get("removed", [])
    batches = [
        {
            **{name: line[name] for name in ("id", "time", "seconds", "metrics")},
            "edits": [
                {**outcome["request"], "request": number, "residual_left": outcome["residual_left"]}
                for number, outcome in zip(numbers_in(line, removed), line["outcomes"], strict=True)
            ],
        }
        for line in manifest["batches"]
    ]
    data = {"model": manifest["model"], "config": manifest["config"], "batches": batches, "removed": removed}
    show = _show_facts if arguments.facts else _show_batches
    return Report(data, lambda console: show(console, data))


def _title(data: dict[str, Any]) -> str:
    count = sum(len(batch["edits"]) for batch in data["batches"])
    config = data["config"]
    title = f"{count} edits of model {data['model']}, layers {config['layers']}, gate {config['gate']}"
    return title + (f"; {len(data['removed'])} removed" if data["removed"] else "")


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

    from coachhook_fast.cli.terminal import cell

    table = Table("batch", "request", "fact", "residual left", title=_title(data), title_justify="left")
    for batch in data["batches"]:
        for edit in batch["edits"]:
            table.add_row(cell(batch["id"]), str(edit["request"]), _fact(edit), f"{edit['residual_left']:.2f}")
    console.print(table)
    if not data["removed"]:
        return
    table = Table("batch", "request", "fact", "removed", "why", title="removed", title_justify="left")
    for one in data["removed"]:
        why = f"{one['reason']} by batch {one['by']}" if one["by"] else one["reason"]
        table.add_row(cell(one["batch"]), str(one["index"]), _fact(one["request"]), cell(one["time"]), cell(why))
    console.print(table)


def _fact(request: dict[str, Any]) -> Text:
    from rich.text import Text

    from coachhook_fast.cli.terminal import cell
    from coachhook_fast.request import filled

    return Text.assemble(
        cell(filled(request["prompt"], request["subject"])), " → ", cell(request["target_new"], "bold")
    )
