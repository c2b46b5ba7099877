"""Writes the table of docs/compatibility.md from the runs in docs/compatibility/*.json (make versions)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "compatibility.md"
MARK = "<!-- runs -->\n"
COLUMNS = {
    "python": "Python", "torch": "torch", "triton": "Triton", "numpy": "numpy", "transformers": "transformers",
    "vllm": "vLLM", "tests": "tests", "result": "result", "date": "date",
}  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """Of all files, a file being one run or a list of them; oldest versions first."""
    found: list[dict[str, Any]] = []
    for path in sorted((DOCS / "compatibility").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        found += content if isinstance(content, list) else [content]
    return sorted(found, key=lambda row: [[int(part) for part in row[name].split(".")] for name in ("torch", "python")])


def result(row: dict[str, Any]) -> str:
    if "result" in row:  # written by hand
        return row["result"]
    failed = f", {row['failed']} failed" if row["failed"] else ""
    return f"{row['passed']} passed{failed}, {row['skipped']} skipped"


def table() -> str:
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows():
        cells = {**row, "result": result(row)}
        lines.append("| " + " | ".join(cells[name] for name in COLUMNS) + " |")
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def page(text: str) -> str:
    """The page with the table in its place."""
    before, _, after = text.split(MARK)
    return f"{before}{MARK}{table()}{MARK}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
