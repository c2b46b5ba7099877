"""Writes architecture.svg beside this file, the way of an edit and of a token (python docs/figures/architecture.py)."""

from __future__ import annotations

from html import escape
from pathlib import Path

# (title, room, text of one or two lines) of each box, in the order of the calls.
EDIT = [
    ("EditRequest", "request", "a fact to change"),
    ("target value", "editing/targets", "v* = v0 + δ"),
    ("keys, residuals", "editing", "K, R a layer"),
    ("solve", "editing + csrc/solver", "X = (C + KKᵀ)⁻¹K"),
    ("append", "edits", "Δ = U B"),
    ("calibrate", "editing", "τ a layer"),
    ("edit set", "edits", "safetensors + JSON"),
]
TOKEN = [
    ("hidden state", "models", "any cache, any batch"),
    ("HookLinear", "hooks", "one edited block"),
    ("gated_linear", "ops: C++, Triton", "base W0 k"),
    ("gate", "csrc, kernels", "‖B k‖ ≥ τ ‖k‖ ?"),
    ("output", "models", "W0 k, or W0 k + U(B k)"),
]
WIDTH, BOX, HIGH, GAP, LEFT, TOP = 1120, 132, 74, 24, 18, 46
STYLE = """
  text { font-family: system-ui, sans-serif; fill: #1f2937; }
  .head { font-size: 15px; font-weight: 600; } .title { font-size: 14px; font-weight: 600; }
  .room { font-size: 11px; fill: #6b7280; } .text { font-size: 12px; }
  rect { fill: #f3f4f6; stroke: #9ca3af; } .fixed { fill: #e0f2fe; } .edited { fill: #fef3c7; }
  path { stroke: #6b7280; fill: none; stroke-width: 1.5; marker-end: url(#arrow); } .dashed { stroke-dasharray: 5 4; }
  .tip { fill: #6b7280; stroke: none; marker-end: none; }
"""


def box(x: int, y: int, title: str, room: str, text: str, kind: str, width: int = BOX) -> str:
    middle = x + width // 2
    lines = (("title", 22, title), ("text", 42, text), ("room", 62, room))
    words = "".join(
        f'<text class="{name}" x="{middle}" y="{y + down}" text-anchor="middle">{escape(content)}</text>'
        for name, down, content in lines
    )
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{HIGH}" rx="8"/>{words}'


def row(y: int, boxes: list[tuple[str, str, str]], kinds: dict[str, str], width: int = BOX) -> list[str]:
    parts = []
    for number, (title, room, text) in enumerate(boxes):
        x = LEFT + number * (width + GAP)
        parts.append(box(x, y, title, room, text, kinds.get(title, "plain"), width))
        if number:
            parts.append(f'<path d="M {x - GAP + 2} {y + HIGH // 2} H {x - 4}"/>')
    return parts


def picture() -> str:
    """The whole SVG as text."""
    second, wide = TOP + 190, 180
    hook = LEFT + wide + GAP + wide - 24
    saved = LEFT + 6 * (BOX + GAP) + BOX // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {second + HIGH + 42}" role="img" '
        'aria-label="The way of an edit, from a request to an edit set, and of a token through a hook layer">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="tip" d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>',
        f'<rect x="0" y="0" width="{WIDTH}" height="{second + HIGH + 42}" style="fill:#ffffff;stroke:none"/>',
        f'<text class="head" x="{LEFT}" y="28">An edit: batch by batch, all or nothing</text>',
        *row(TOP, EDIT, {"edit set": "edited", "append": "edited"}),
        f'<text class="head" x="{LEFT}" y="{second - 18}">A token: the base weight is never written</text>',
        *row(second, TOKEN, {"HookLinear": "edited", "gated_linear": "fixed"}, wide),
        f'<path class="dashed" d="M {saved} {TOP + HIGH + 2} V {second - 50} H {hook} V {second - 4}"/>',
        f'<text class="room" x="{saved - 8}" y="{second - 56}" text-anchor="end">publish: the next pass has it</text>',
        f'<text class="room" x="{LEFT}" y="{second + HIGH + 26}">C remembers the keys of ordinary text and of all '
        "earlier edits, as a Cholesky factor that is updated and never recomputed.</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
