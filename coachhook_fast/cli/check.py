"""`coachhook check`: whether an edited model says the facts of its edit set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from coachhook_fast.cli.common import Report, add_edits, add_model, load_model

if TYPE_CHECKING:
    from rich.console import Console

NAME = "check"
HELP = "Ask an edited model for every fact of its edit set, greedily, in the prompt and its paraphrases."
EXAMPLES = """examples:
  coachhook check --model smollm2 --edits edits/
  coachhook check --model smollm2 --edits edits/ --json

The exit code is 0 where all is said, 1 where something is not: the table tells what is said instead. Paraphrases are
those that the edits themselves were given. An edit that holds behind other text only is asked behind such text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=True)


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest

    read_manifest(arguments.edits)  # what is no edit set is refused before a model is loaded
    model, tokenizer = load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    facts = Editor(model, tokenizer, edits=arguments.edits).check()
    lines = [
        {
            "batch": fact.batch,
            "request": fact.index,
            "subject": fact.request.subject,
            "target_new": fact.request.target_new,
            "in_context_only": fact.in_context_only,
            "said": fact.said,
            "questions": [vars(answer) for answer in (fact.prompt, *fact.paraphrases)],
        }
        for fact in facts
    ]
    silent = sum(not fact.said for fact in facts)
    data: dict[str, Any] = {"facts": lines, "said": len(facts) - silent, "not_said": silent}
    return Report(data, lambda console: _show(console, data), code=1 if silent else 0)


def _show(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from coachhook_fast.cli.terminal import cell

    title = f"{data['said']} of {len(data['facts'])} facts are said"
    table = Table("batch", "request", "question", "new answer", "said", "instead", title=title, title_justify="left")
    for fact in data["facts"]:
        for asked in fact["questions"]:
            said = Text("yes") if asked["said"] else Text("no", style="red")
            instead = "" if asked["said"] else asked["answer"]
            table.add_row(
                cell(fact["batch"]), str(fact["request"]), cell(asked["text"]), cell(fact["target_new"]), said,
                cell(instead),
            )  # fmt: skip
    console.print(table)
