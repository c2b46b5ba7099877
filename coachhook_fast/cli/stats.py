"""`coachhook stats`: the key statistics that editing stands on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast.cli.common import Report, add_config, add_model, load_config, load_model, positive

if TYPE_CHECKING:
    from rich.console import Console

NAME = "stats"
HELP = "Collect a model's key statistics once; later edits with the same settings find them in the cache."
EXAMPLES = """examples:
  coachhook stats --model smollm2
  coachhook stats --model smollm2 --corpus wikitext.txt --max-tokens 100000
  coachhook stats --model meta-llama/Llama-3.1-8B --corpus wikitext.txt --layers 4-8 --dtype bfloat16

Without --corpus the model writes the text itself, so nothing has to be downloaded. The cache is $COACHHOOK_CACHE or
~/.cache/coachhook; an interrupted run goes on where it stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="text file, documents separated by blank lines")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="token budget, as --set mom2_n_tokens=N: give `edit` that"
    )
    add_config(parser)


def run(arguments: argparse.Namespace) -> Report:
    config = load_config(arguments)
    model, tokenizer = load_model(arguments)
    from coachhook_fast.editing.editor import Editor

    editor = Editor(model, tokenizer, config)
    statistics = editor.collect_statistics(arguments.corpus, max_tokens=arguments.max_tokens)
    layers = [
        {
            "layer": layer,
            "key_dim": editor.key_dim,
            "mean_square_norm": float(statistics.moments[layer].diagonal().double().sum()),
            "largest_mean_square": float(statistics.moments[layer].diagonal().max()),
            "sampled_keys": len(statistics.samples[layer]),
        }
        for layer in editor.layers
    ]
    data = {"model": statistics.model, "tokens": statistics.tokens, "layers": layers}

    def show(console: Console) -> None:
        from rich.table import Table

        table = Table(title=f"{statistics.tokens:,} keys of model {statistics.model}", title_justify="left")
        for head in ("layer", "d", "E‖k‖²", "largest E[k_i²]", "sampled keys"):
            table.add_column(head, justify="right")
        for line in layers:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in line.values()))
        console.print(table)

    return Report(data, show)
