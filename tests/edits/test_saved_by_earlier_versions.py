"""Edit sets that an earlier version saved (tests/fixtures/edit_sets): loaded, served, gone on from as they were then.

`expected.safetensors` holds what that version gave: token ids, logits of the last token after the last batch and after
the first, each layer's Δ. The base model lies beside it, for random numbers may differ elsewhere.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import edit, facts
from safetensors.torch import load_file
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import Editor, load_edits
from coachhook_fast.edits import store

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "edit_sets"
EXPECTED = load_file(FOLDER / "expected.safetensors")
SETS = ("round_robin", "sequence", "two_batches")


def base() -> Any:
    model = tiny_model("llama")
    model.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return model


def expected(kind: str) -> list[torch.Tensor]:
    return [EXPECTED[f"{kind}.{n}"] for n in range(sum(name.startswith(f"{kind}.") for name in EXPECTED))]


@torch.no_grad()
def last_logits(model: Any) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0, -1] for ids in expected("ids")]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_it_serves_what_it_served(name: str) -> None:
    wanted = expected(f"{name}.logits")
    clean = last_logits(base())
    assert max(float((one - other).abs().max()) for one, other in zip(clean, wanted, strict=True)) > 0.1
    assert_close(last_logits(load_edits(base(), FOLDER / name)), wanted)


@pytest.mark.parametrize("name", SETS)
def test_it_reads_what_was_written(name: str) -> None:
    edits = store.load(FOLDER / name)
    for delta, wanted in zip(edits.deltas, expected(f"{name}.delta"), strict=True):
        assert torch.equal(delta.dense(), wanted)
    assert [len(batch.outcomes) for batch in edits.batches] == ([2] if name == "sequence" else [2, 3])


@pytest.mark.parametrize("name", SETS)
def test_editing_goes_on(name: str, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / name, tmp_path / name)
    editor = Editor(base(), tiny_tokenizer(), edits=tmp_path / name)
    editor.collect_statistics(tiny_texts(12), progress=False)
    assert_close(last_logits(editor.model), expected(f"{name}.logits"))
    edit(editor, facts(2, seed=7))
    editor.save_pretrained(tmp_path / name)
    editor.rollback(editor.ledger[-1].id)
    assert_close(last_logits(editor.model), expected(f"{name}.logits"))
    assert len(store.load(tmp_path / name).batches) == len(editor.ledger) + 1


@pytest.mark.parametrize("name", ["round_robin", "two_batches"])
def test_a_batch_is_rolled_back(name: str) -> None:
    editor = Editor(base(), tiny_tokenizer(), edits=FOLDER / name)
    editor.collect_statistics(tiny_texts(12), progress=False)
    editor.rollback(editor.ledger[-1].id)
    assert_close(last_logits(editor.model), expected(f"{name}.first_batch"))
