"""`coachhook verify-edits`: whether an edit set is whole, sound, and what its ledger says."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from coachhook_fast.cli.common import Report

if TYPE_CHECKING:
    from rich.console import Console

NAME = "verify-edits"
HELP = "Check an edit set: files, checksums, every value, and that the ledger's updates add up to the weights."
EXAMPLES = """examples:
  coachhook verify-edits edits/
  coachhook verify-edits edits/ --json

Needs no model. The exit code is 0 where all holds, 2 where something does not; the error says what and where.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a saved edit set")


def run(arguments: argparse.Namespace) -> Report:
    from coachhook_fast.edits import store
    from coachhook_fast.edits.check import disagreement, orthonormality

    edits = store.load(arguments.folder)  # which checks it
    layers = [
        {
            "layer": layer,
            "out_features": delta.out_features,
            "in_features": delta.in_features,
            "rank": delta.rank,
            "threshold": threshold.value if math.isfinite(threshold.value) else None,
            "orthonormality": orthonormality(delta),
            "disagreement": disagreement(edits, position),
        }
        for position, (layer, delta, threshold) in enumerate(
            zip(edits.layers, edits.deltas, edits.thresholds, strict=True)
        )
    ]
    data = {
        "folder": str(arguments.folder),
        "model": edits.model,
        "gate": edits.config.gate,
        "batches": len(edits.batches),
        "edits": edits.num_edits,
        "layers": layers,
    }

    def show(console: Console) -> None:
        from rich.table import Table

        title = f"{edits.num_edits} edits in {len(edits.batches)} batches, of model {edits.model}: sound"
        table = Table(title=title, title_justify="left")
        for head in ("layer", "m", "d", "rank", "threshold", "|UᵀU - I|", "|Δ - Σ R Xᵀ|, relative"):
            table.add_column(head, justify="right")
        for line in layers:
            shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values()]
            table.add_row(*("∞" if value == "None" else value for value in shown))
        console.print(table)

    return Report(data, show)
