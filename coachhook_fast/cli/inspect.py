"""`coachhook inspect`: what the gate sees of a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from coachhook_fast.cli.common import Report, add_edits, add_model, load_model, note

NAME = "inspect"
HELP = "Show each token's norm, z and gate decision in every edited layer, in colour."
EXAMPLES = """examples:
  coachhook inspect --model smollm2 --edits edits/ "The Eiffel Tower is located in the city of"
  coachhook inspect --model smollm2 --edits edits/ --html gate.html --png gate.png "George Eliot was a famous"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=True)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture (extra plot)")


def run(arguments: argparse.Namespace) -> Report:
    model, tokenizer = load_model(arguments)
    from coachhook_fast.evaluate.inspect import as_table, inspect_prompt, write_html, write_png
    from coachhook_fast.hooks.load_edits import load_edits

    inspection = inspect_prompt(load_edits(model, arguments.edits), tokenizer, arguments.prompt)
    for path, write in ((arguments.html, write_html), (arguments.png, write_png)):
        if path is not None:
            write(inspection, path)
            note(f"wrote {path}")
    return Report(inspection.to_dict(), lambda console: console.print(as_table(inspection)))
