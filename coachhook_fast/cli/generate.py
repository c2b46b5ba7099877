"""`coachhook generate`: what a model says, edited or not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coachhook_fast.cli.common import Report, add_edits, add_model, load_model, positive

if TYPE_CHECKING:
    from rich.console import Console

NAME = "generate"
HELP = "Continue prompts greedily with the edited model."
EXAMPLES = """examples:
  coachhook generate --model smollm2 --edits edits/ "The Eiffel Tower is located in the city of"
  coachhook generate --model smollm2 --edits edits/ --compare --max-new-tokens 30 \\
      "George Orwell was a famous" "George Eliot was a famous"
  coachhook generate --model smollm2 "The capital of South Korea is"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=False)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--max-new-tokens", type=positive, default=20, metavar="N", help="default 20")
    parser.add_argument("--compare", action="store_true", help="show what the base model says, too")


def run(arguments: argparse.Namespace) -> Report:
    for prompt in arguments.prompts:
        if not prompt.strip():
            raise ValueError(f"PROMPT is empty: {prompt!r}")
    model, tokenizer = load_model(arguments)
    from coachhook_fast.evaluate import complete
    from coachhook_fast.evaluate.base import unedited
    from coachhook_fast.hooks.load_edits import load_edits

    if arguments.edits is not None:
        load_edits(model, arguments.edits)
    length = arguments.max_new_tokens
    texts = complete(model, tokenizer, arguments.prompts, max_new_tokens=length)
    lines = [{"prompt": prompt, "completion": text} for prompt, text in zip(arguments.prompts, texts, strict=True)]
    if arguments.compare:
        with unedited(model):
            before = complete(model, tokenizer, arguments.prompts, max_new_tokens=length)
        for line, text in zip(lines, before, strict=True):
            line["base_completion"] = text

    def show(console: Console) -> None:
        from rich.text import Text

        for line in lines:
            console.print(Text.assemble(line["prompt"], (line["completion"], "bold green")))
            if arguments.compare:
                console.print(
                    Text.assemble((f"base: {line['prompt']}", "dim"), (line["base_completion"], "dim italic"))
                )

    return Report(lines, show)
