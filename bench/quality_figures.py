"""The figures of `quality.py` against the number of edits: metrics, the size of Δ, and how the gate sees each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (
    "fact_score", "reliability", "paraphrase", "same_subject", "leak", "leak_passing",
    "locality", "repeats", "generality", "perplexity_ratio", "delta_ratio",
)  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes one PNG with a panel a metric and a line a method."""
    lines = _by_method(rows)
    figure, axes = pyplot.subplots(3, 4, figsize=(16, 10), layout="constrained")
    for axis, name in zip(axes.flat, PANELS, strict=False):
        for title, points in lines.items():
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
    gated = [row for row in rows if all("threshold_z" in layer for layer in row.get("layers") or [{}])]
    if gated:
        first = f"{gated[0]['method']} ({gated[0]['gate']})"  # the table's, whatever its counts
        draw_gate(_by_method(gated)[first], path.with_name(f"{path.stem}-gate.png"))


def draw_gate(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes one PNG of a method's rows: a panel a layer with the z of the edit keys, of ordinary text and of the
    threshold between, and one with the share of ordinary text that fires."""
    counts, layers = [row["edits"] for row in rows], len(rows[0]["layers"])
    columns = (layers + 2) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(5 * columns, 8), layout="constrained", squeeze=False)

    def line(index: int, name: str) -> list[float]:
        return [row["layers"][index][name] for row in rows]

    for index, axis in enumerate(axes.flat[:layers]):
        axis.fill_between(
            counts, line(index, "own_z_05"), line(index, "own_z_95"), alpha=0.3, label="edit keys, 5 to 95 %"
        )
        axis.plot(counts, line(index, "own_z_50"), marker="o", label="edit keys, median")
        axis.plot(counts, line(index, "threshold_z"), "k--", marker="o", label="threshold")
        axis.plot(counts, line(index, "ordinary_z_999"), marker="o", label="ordinary text, 99.9 %")
        axis.plot(counts, line(index, "ordinary_z_max"), marker=".", alpha=0.5, label="ordinary text, largest")
        axis.set_title(f"edited layer, number {index + 1} of {layers}")
        axis.set_ylabel("z of what the gate measures")
        axis.set_ylim(bottom=0)
        last = axes.flat[layers]
        last.plot(counts, line(index, "fire_rate"), marker="o", label=axis.get_title())
    last.set_title("share of ordinary text that fires")
    for axis in axes.flat[layers + 1 :]:
        axis.axis("off")
    for axis in axes.flat[: layers + 1]:
        axis.set_xlabel("edits")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["edits"]):
        lines.setdefault(f"{row['method']} ({row['gate']})", []).append(row)
    return lines


def _value(row: dict[str, Any], name: str) -> float | None:
    if name != "delta_ratio":
        return row.get(name)
    return max((layer["delta_ratio"] for layer in row.get("layers", [])), default=None)
