"""The notebooks of docs/notebooks run from their first cell to their last, on a tiny model.

Their cells are run here in one namespace, as a kernel would: the packages of a kernel are not among the tests'.
"""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_texts, tiny_tokenizer

import coachhook_fast
from coachhook_fast import EditWarning

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_some() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_without_outputs(path: Path) -> None:
    """What a run gives differs from machine to machine, and pictures make a history heavy."""
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("Agg")  # pictures are drawn, and no window opens
    if path.stem.startswith("serve"):
        pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    monkeypatch.setattr(coachhook_fast, "load_model", lambda _: (model, tokenizer), raising=False)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # a random model: edits need not go in
        for number, cell in enumerate(code_cells(path)):
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", ()):  # papermill's name for what may be set from outside
                names["corpus"] = tiny_texts(40)
