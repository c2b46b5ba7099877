"""`coachhook bench`: our work against a named baseline, each row checked before it is timed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

NAME = "bench"
HELP = "Time a part of the package against its baseline; ratio is the baseline's seconds over ours."
EXAMPLES = """examples:
  coachhook bench --list
  coachhook bench solve
  coachhook bench solve --json > rows.json
  coachhook bench gated-linear --model smollm2 --edits edits/    # your own model's edited layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="which benchmark")
    parser.add_argument(
        "--model", metavar="M", help="for gated-linear, statistics and targets: a model instead of theirs"
    )
    parser.add_argument("--edits", metavar="DIR", help="for gated-linear: the edit set of --model")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.bench import BENCHMARKS

    if arguments.list:
        found = sorted(BENCHMARKS)
        return Report(found, lambda console: console.print("\n".join(found), markup=False))
    if arguments.name not in BENCHMARKS:
        raise ValueError(f"NAME must be one of {', '.join(sorted(BENCHMARKS))}, got {arguments.name!r}")
    given = {"model": arguments.model, "edits": arguments.edits}
    rows = BENCHMARKS[arguments.name](**{name: value for name, value in given.items() if value is not None})

    def show(console: Console) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("work", "baseline", "seconds", "baseline seconds", "ratio", "floor", "checked", "shape", "dtype")
        for row in rows:
            numbers = [f"{row[name]:.3g}" for name in ("seconds", "baseline_seconds", "ratio", "floor_ratio")]
            words = [str(row["checked"]), str(row["shape"]), str(row["dtype"])]
            table.add_row(Text(row["work"]), Text(row["baseline"]), *numbers, *map(Text, words))
        console.print(table)

    return Report(rows, show)
