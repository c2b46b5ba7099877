"""Token by token, layer by layer: what the gate of an edited model sees of a prompt, and what it decides.

`inspect_prompt` runs the prompt once and asks each hook for its trace. The level of a token is its norm over
τ (`calibrated`) or its z over α (`sequence`): the edit fires from 1 on. `as_table` shows it in a terminal,
`write_html` as one self-contained page, `write_png` as a picture.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coachhook_fast.hooks.hooks import hooks_of
from coachhook_fast.hooks.layer import GateTrace, HookLinear
from coachhook_fast.models.loading import context_length
from coachhook_fast.models.placement import input_device
from coachhook_fast.printable import printable
from coachhook_fast.request import prompt_ids

if TYPE_CHECKING:
    from rich.table import Table

_LAYOUT = "\n\t"  # a page shows them as spaces


@dataclass(frozen=True)
class Inspection:
    """What every edited layer saw of every token of a prompt.

    Attributes:
        prompt: the text; tokens: its tokens as text; ids: their ids.
        gate: "calibrated" or "sequence".
        layers: the edited blocks; thresholds: τ or α of each.
        norm: [T, L] ||Δk||, or ||Δk|| / ||k|| where τ is `relative`; z: [T, L], NaN where it has no meaning.
        fire: [T, L] bool.
    """

    prompt: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    gate: str
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    norm: Tensor
    z: Tensor
    fire: Tensor
    relative: bool = False

    @property
    def measure(self) -> str:
        """What `norm` is, as a reader is told."""
        return "‖Δk‖ / ‖k‖" if self.relative else "‖Δk‖"

    @property
    def level(self) -> Tensor:
        """[T, L]: what is compared with the threshold, over the threshold; the edit fires from 1 on."""
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return (self.z if self.gate == "sequence" else self.norm) / thresholds

    def to_dict(self) -> dict[str, Any]:
        """Only what JSON knows: a list of tokens, each with one entry a layer; null for NaN and infinity."""
        columns = (self.norm, self.z, self.fire)
        return {
            "prompt": self.prompt,
            "gate": self.gate,
            "relative": self.relative,
            "layers": list(self.layers),
            "thresholds": [_finite(value) for value in self.thresholds],
            "tokens": [
                {
                    "token": token,
                    "id": id_,
                    "norm": [_finite(value) for value in norm],
                    "z": [_finite(value) for value in z],
                    "fire": fire,
                }
                for token, id_, norm, z, fire in zip(
                    self.tokens, self.ids, *(column.tolist() for column in columns), strict=True
                )
            ],
        }


def inspect_prompt(model: nn.Module, tokenizer: Any, prompt: str) -> Inspection:
    """Runs `prompt` through the edited model and records every hook's decision; the model is as before
    afterwards.

    Raises:
        ValueError: the model has no hooks, or the prompt has no tokens or more than the model's context.
    """
    handle = hooks_of(model)
    if handle is None:
        raise ValueError("model has no edits: install an edit set first (load_edits)")
    ids = prompt_ids(tokenizer, prompt)
    limit = context_length(model)
    if not ids:
        raise ValueError(f"prompt has no tokens: {prompt!r}")
    if limit is not None and len(ids) > limit:
        raise ValueError(f"prompt has {len(ids)} tokens, the model's context is {limit}")
    device = input_device(model)
    with torch.no_grad(), _recorded(handle.hooks) as traces:
        tokens = torch.tensor([ids], device=device)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return Inspection(
        prompt=prompt,
        tokens=tuple(tokenizer.decode([id_]) for id_ in ids),
        ids=tuple(ids),
        gate=handle.hooks[0].gate,
        layers=handle.layers,
        thresholds=tuple(hook.threshold for hook in handle.hooks),
        norm=_stack([trace.norm for trace in traces]),
        z=_stack([trace.z for trace in traces]),
        fire=torch.stack([trace.fire.reshape(-1).cpu() for trace in traces], dim=1),
        relative=any(trace.relative for trace in traces),
    )


@contextmanager
def _recorded(hooks: list[HookLinear]) -> Iterator[list[GateTrace]]:
    """Each hook's trace of the forward pass run within the block, in the hooks' order."""
    traces: list[GateTrace] = []

    def record(hook: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(hook, HookLinear)
        traces.append(hook.trace(args[0]))

    handles = [hook.register_forward_pre_hook(record) for hook in hooks]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()


def _stack(columns: list[Tensor]) -> Tensor:
    return torch.stack([column.reshape(-1).double().cpu() for column in columns], dim=1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------- views


def as_table(inspection: Inspection) -> Table:
    """A rich table, a row a token and a column a layer: norm and z, the warmer the nearer to the threshold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"gate: {inspection.gate}    ● = the edit fires    cell: {inspection.measure}, z", title_justify="left"
    )
    table.add_column("token", no_wrap=True)
    for head in _heads(inspection):
        table.add_column(head, justify="right", no_wrap=True)
    for row, token in enumerate(inspection.tokens):
        cells = [Text(visible(token))]
        for column in range(len(inspection.layers)):
            red, green, blue = _colour(float(inspection.level[row, column]))
            fires = bool(inspection.fire[row, column])
            style = f"{'bold ' if fires else ''}black on rgb({red},{green},{blue})"
            cells.append(Text(f" {_cell(inspection, row, column)} ", style=style))
        table.add_row(*cells)
    return table


_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse }
th, td { padding: .25em .6em; border: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; white-space: pre }
.fire { font-weight: bold; outline: 2px solid #b00; outline-offset: -2px }
"""


def write_html(inspection: Inspection, path: str | Path) -> None:
    """One page without scripts or outside files."""
    heads = "".join(f"<th>{head.replace(chr(10), '<br>')}</th>" for head in _heads(inspection))
    rows = []
    for row, token in enumerate(inspection.tokens):
        cells = [f"<td>{html.escape(visible(token))}</td>"]
        for column in range(len(inspection.layers)):
            red, green, blue = _colour(float(inspection.level[row, column]))
            fires = ' class="fire"' if inspection.fire[row, column] else ""
            text = html.escape(_cell(inspection, row, column))
            cells.append(f'<td{fires} style="background: rgb({red},{green},{blue})">{text}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>\n")
    compared = "z" if inspection.gate == "sequence" else inspection.measure
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>coachhook inspect</title>\n'
        f"<style>{_STYLE}</style>\n<h1>What the gate sees</h1>\n"
        f"<p>Prompt: <q>{html.escape(printable(inspection.prompt, keep=_LAYOUT))}</q></p>\n"
        f"<p>Gate <code>{inspection.gate}</code>. A cell holds {inspection.measure} and z. "
        f"The edit fires where {compared} reaches "
        f"{_symbol(inspection)}: ● in a red frame.</p>\n"
        f"<table><tr><th>token</th>{heads}</tr>\n{''.join(rows)}</table></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def write_png(inspection: Inspection, path: str | Path) -> None:
    """A picture of the same table. Raises ValueError where matplotlib (the extra `plot`) is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ValueError("a PNG needs matplotlib: pip install 'coachhook-fast[plot]'") from error
    rows, columns = inspection.norm.shape
    figure = Figure(figsize=(2.5 + 1.3 * columns, 1.2 + 0.32 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow([[_colour(level) for level in line] for line in inspection.level.tolist()], aspect="auto")
    for row in range(rows):
        for column in range(columns):
            axes.text(column, row, _cell(inspection, row, column), ha="center", va="center", fontsize=8)
            if inspection.fire[row, column]:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#b00000", linewidth=2))
    # A dollar sign would start mathematics.
    axes.set_yticks(range(rows), [visible(token).replace("$", r"\$") for token in inspection.tokens])
    axes.set_xticks(range(columns), _heads(inspection))
    axes.xaxis.tick_top()
    axes.set_title(f"{inspection.measure}, z and decision (●), gate: {inspection.gate}", fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def visible(token: str) -> str:
    """A token with its spaces, line breaks and what a terminal or browser would obey made visible."""
    return printable(token.replace("\\", "\\\\")).replace(" ", "·")


def _symbol(inspection: Inspection) -> str:
    return "α" if inspection.gate == "sequence" else "τ"


def _heads(inspection: Inspection) -> list[str]:
    """Two lines a layer: its number, its threshold."""
    thresholds = zip(inspection.layers, inspection.thresholds, strict=True)
    return [f"layer {layer}\n{_symbol(inspection)} {threshold:.3g}" for layer, threshold in thresholds]


def _cell(inspection: Inspection, row: int, column: int) -> str:
    z = float(inspection.z[row, column])
    mark = "● " if inspection.fire[row, column] else ""
    return f"{mark}{float(inspection.norm[row, column]):.3g}" + ("" if math.isnan(z) else f", {z:+.1f}")


def _colour(level: float) -> tuple[int, int, int]:
    """White at 0 over yellow at the threshold to red at twice the threshold."""
    if not math.isfinite(level) or level <= 0:
        return 255, 255, 255
    below, above = min(level, 1.0), min(max(level - 1.0, 0.0), 1.0)
    return 255, round(255 - 35 * below - 130 * above), round(255 - 155 * below - 20 * above)
