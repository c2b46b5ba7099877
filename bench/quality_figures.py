"""The figures of `quality.py`: each metric, the size of Δ, against the number of edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = ("reliability", "generality", "locality", "generation", "perplexity_ratio", "harmonic_mean", "delta_ratio")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes one PNG with a panel a metric and a line a method."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(f"{row['method']} ({row['gate']})", []).append(row)
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for axis, name in zip(axes.flat, PANELS, strict=False):
        for title, points in lines.items():
            points = sorted(points, key=lambda row: row["edits"])
            pairs = [(row["edits"], _value(row, name)) for row in points]
            pairs = [(count, value) for count, value in pairs if value is not None]
            axis.plot([count for count, _ in pairs], [value for _, value in pairs], marker="o", label=title)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("edits")
        if name == "perplexity_ratio":
            axis.set_yscale("log")
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _value(row: dict[str, Any], name: str) -> float | None:
    if name != "delta_ratio":
        return row.get(name)
    return max((layer["delta_ratio"] for layer in row.get("layers", [])), default=None)
