"""The table of a quality run: JSON, CSV and Markdown beside each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coachhook_fast.evaluate.result import AVERAGED

COLUMNS = (
    "method", "gate", "edits", "batch_size", "fact_score", "reliability", "paraphrase", "paraphrase_same_question",
    "same_subject", "leak", "leak_passing", "locality", "repeats", "said", "said_paraphrase", "said_question",
    "said_chat", "portability", "perplexity_ratio", "seconds_per_edit", "generality", "generation", "harmonic_mean",
    "drift", "locality_unedited", "held_out_tokens",
)  # fmt: skip
COMPOSED = ("fact_score", "harmonic_mean", "rome_score")
ROME = ("generation_rephrase", "efficacy", "rome_paraphrase", "neighbourhood", "rome_score")
SCORES = (*AVERAGED, *COMPOSED)  # of an evaluation's summary


def write_table(rows: Sequence[dict[str, Any]], out: Path) -> None:
    write(out.with_suffix(".json"), json.dumps(list(rows), indent=1) + "\n")
    part = out.with_suffix(".csv.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *ROME], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(out.with_suffix(".csv"))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |" for row in rows]
    write(out.with_suffix(".md"), "\n".join(lines) + "\n")


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def write(path: Path, text: str) -> None:
    """A reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
