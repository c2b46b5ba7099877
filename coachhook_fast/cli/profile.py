"""`coachhook profile`: what an edit set costs a model of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast import files
from coachhook_fast.cli.common import Report, add_edits, add_model, load_model, names, note, positive

if TYPE_CHECKING:
    from rich.console import Console

    from coachhook_fast.bench.profile import Profile

NAME = "profile"
HELP = "Time your own model with and without an edit set: prefill, decode step, memory."
EXAMPLES = """examples:
  coachhook profile --model smollm2 --edits edits/
  coachhook profile --model M --edits edits/ --dtype bfloat16 --batch 1,32 --prompt-tokens 2048 --png cost.png

Both models share their weights and run in turns; a ratio is edited ÷ unedited. The passes read the edits' own prompts,
at which they fire; --text takes another text, such as your own traffic.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_edits(parser, required=True)
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the passes read (default: the edits' prompts)")
    parser.add_argument("--batch", type=_batches, default=[1, 8], metavar="B,..", help="rows a pass (default 1,8)")
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N", help="tokens a row (default 128)")
    parser.add_argument("--seconds", type=positive, default=5, metavar="S", help="for each kind of pass (default 5)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a chart (extra plot)")


def _batches(text: str) -> list[int]:
    return [positive(count) for count in names(text)]


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits.manifest import read_manifest

    read_manifest(arguments.edits)  # what is no edit set is refused before a model is loaded
    text = None if arguments.text is None else files.read_text(arguments.text, most=files.MOST_FACTS)
    model, tokenizer = load_model(arguments)
    from coachhook_fast.bench.profile import profile, write_png

    found = profile(
        model, tokenizer, arguments.edits, text=text, batches=arguments.batch, prompt_tokens=arguments.prompt_tokens,
        seconds=arguments.seconds,
    )  # fmt: skip
    if arguments.png is not None:
        write_png(found, arguments.png)
        note(f"wrote {arguments.png}")
    return Report(found.to_dict(), lambda console: _show(console, found))


def _show(console: Console, found: Profile) -> None:
    from rich.table import Table

    held = f"{found.held_bytes / 1e6:.1f} MB beside {found.weight_bytes / 1e6:.0f} MB of weights"
    title = f"{found.edits} edits in {len(found.layers)} layers, {held}; {found.firing:.0%} of the tokens fire"
    table = Table(title=title, title_justify="left")
    for head in ("pass", "batch", "tokens", "unedited ms", "edited ms", "ratio", "unedited peak MB", "edited peak MB"):
        table.add_column(head, justify="left" if head == "pass" else "right")
    for cost in found.costs:
        sides = (cost.unedited, cost.edited)
        times = [f"{1e3 * side.seconds:.2f}" for side in sides]
        peaks = [f"{side.peak_bytes / 1e6:.1f}" for side in sides]
        table.add_row(cost.work, str(cost.batch), str(cost.tokens), *times, f"{cost.ratio:.3f}", *peaks)
    console.print(table)
