"""Single facts removed, as if they had never been (method.md section 7); sets of earlier versions too."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, logits, make, raising, snapshot
from safetensors.torch import load_file
from single_fact_cases import CONFIGS, ROUND_ROBIN, assert_close, born, others
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import Editor, EditRequest
from coachhook_fast.editing.calibration import calibrate
from coachhook_fast.edits import store


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fact_removed_and_editing_that_goes_on_equal_the_definition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense sums in fp64 over what is left, by layer: Δ, C, τ; and with them the next batch: R (C + KKᵀ + NNᵀ)⁻¹ K."""
    monkeypatch.setattr("coachhook_fast.editing.schedule._REQUESTS_A_GROUP", 2)  # a batch is shared out over layers
    editor = make(config=CONFIGS[name], dtype=torch.float64)
    requests = facts(9)
    first, second = edit(editor, requests[:4]), edit(editor, requests[4:6])
    gone = editor.remove(first.id, 2)
    assert (gone.batch, gone.index, gone.request, gone.reason) == (first.id, 2, requests[2], "removed")
    assert list(editor.edit_set.requests) == [*requests[:2], *requests[3:6]]
    assert editor.statistics is not None
    weight = editor.config.mom2_update_weight
    deltas, memories = [], []
    for position, layer in enumerate(editor.layers):
        delta = torch.zeros_like(editor.hooks[position].get_delta_weight())
        memory = weight * editor.statistics.moments[layer].double()
        keys = []
        for batch in (first, second):
            update = batch.layers[position]
            assert update.requests is not None
            for column, place in enumerate(update.requests):
                if (batch.id, place) == (first.id, 2):
                    continue
                k = update.keys[:, column]
                memory = memory + k.outer(k)
                if column < update.residuals.shape[1]:
                    delta = delta + update.residuals[:, column].outer(update.directions[:, column])
                    keys.append(k)
        deltas.append(delta)
        memories.append(memory)
        torch.testing.assert_close(editor.hooks[position].get_delta_weight(), delta, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(editor.memories[position].matrix(), memory, rtol=1e-9, atol=1e-9)
        if name == "sequence":
            alphas = [u.alphas for u in (first.layers[position], second.layers[position])]
            assert min(alphas[0]) == first.layers[position].alpha
            wanted = min([editor.config.alpha, *(a for i, a in enumerate(alphas[0]) if i != 2), *alphas[1]])
        else:
            sample = editor.statistics.samples[layer]
            wanted = calibrate(editor.edit_set.deltas[position], sample, torch.stack(keys, 1), editor.config).value
        assert editor.hooks[position].threshold == pytest.approx(wanted, rel=1e-9)
    seen: dict[Any, Any] = {}
    edit(editor, requests[6:], observer=lambda event, layer, **found: seen.setdefault((event, layer), found))
    assert any(event == "update" for event, _ in seen)
    for position, layer in enumerate(editor.layers):
        if ("update", layer) not in seen:
            torch.testing.assert_close(
                editor.hooks[position].get_delta_weight(), deltas[position], rtol=1e-9, atol=1e-11
            )
            continue
        K, R, N = (seen["update", layer][part].double() for part in ("K", "R", "N"))
        X = torch.linalg.solve(memories[position] + K @ K.T + N @ N.T, K)[:, : R.shape[1]]
        torch.testing.assert_close(
            editor.hooks[position].get_delta_weight(), deltas[position] + R @ X.T, rtol=1e-7, atol=1e-9
        )


def test_nothing_of_a_removed_residual_is_left_in_the_others() -> None:
    """Where edits are made to go in whole: the keys are mixed for that, and every residual stays its own request's."""
    specific = CONFIG.replace(layers=(2,), specific=True, keep_factor=0.0, v_lr=None)
    editor = make(config=specific, dtype=torch.float64)
    seen: dict[str, Any] = {}
    batch = edit(editor, others(3), observer=lambda event, layer, **found: seen.update({event: found}))
    K, R, X = (seen["update"][part] for part in ("K", "R", "X"))
    torch.testing.assert_close(K.T @ X, torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)  # all goes in
    torch.testing.assert_close(batch.layers[0].residuals, R)
    editor.remove(batch.id, 1)
    left = editor.edit_set.deltas[0].dense()
    theirs = R[:, [0, 2]]
    torch.testing.assert_close(theirs @ torch.linalg.lstsq(theirs, left).solution, left, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_only_request_of_a_batch_is_its_rollback_to_the_bit(name: str) -> None:
    one, other = (make(config=CONFIGS[name]) for _ in range(2))
    for editor, undo in ((one, lambda e, b: e.remove(b, 0)), (other, lambda e, b: e.rollback(b))):
        ids = [edit(editor, [request]).id for request in others(3)]
        undo(editor, ids[1])
        undo(editor, ids[2])
        assert [batch.id for batch in editor.ledger] == ids[:1]
    assert_same(snapshot(one), snapshot(other))
    assert one.edit_set.thresholds == other.edit_set.thresholds


def test_bad_requests_to_remove_change_nothing() -> None:
    editor = make()
    batch = edit(editor, others(2))
    editor.remove(batch.id, 0)
    before, edits = snapshot(editor), editor.edit_set
    for arguments, message in (
        ((batch.id, 0), "request 0 of batch .* is not there any more: removed at"),
        ((batch.id, 2), r"has no request 2: it has \[1\]"),
        ((batch.id, -1), "has no request -1"),
        (("other", 0), "batch_id 'other' is not in the ledger"),
    ):
        with pytest.raises(ValueError, match=message):
            editor.remove(*arguments)
    with pytest.raises(TypeError, match="index must be an integer, got '1'"):
        editor.remove(batch.id, "1")  # type: ignore[arg-type]
    assert editor.edit_set is edits
    assert_same(snapshot(editor), before)
    assert editor.remove(batch.id, 1).index == 1
    assert editor.ledger == ()


def test_a_memory_that_cannot_give_a_fact_up_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(dtype=torch.float64)
    batch = edit(editor, others(3))
    before, edits = snapshot(editor), editor.edit_set
    monkeypatch.setattr(editor.memories[1], "downdate", raising(ValueError))
    with pytest.raises(ValueError):
        editor.remove(batch.id, 1)
    monkeypatch.undo()
    assert editor.edit_set is edits
    assert_close(snapshot(editor), before, 1e-12)


@pytest.mark.parametrize("name", ["sequence", "round_robin"])
def test_going_on_in_another_process_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    editor = make(config=CONFIGS[name], dtype=torch.float64)
    batch = edit(editor, others(3))
    edit(editor, [born("Rome")])
    editor.save_pretrained(tmp_path)
    resumed = Editor(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), edits=tmp_path)
    for one in (editor, resumed):
        if not one.memories:
            one.collect_statistics(tiny_texts(12), progress=False)
        one.remove(batch.id, 1)
        edit(one, [born("Oslo"), facts(6)[5]])
    assert_close(snapshot(resumed), snapshot(editor), 1e-7)
    resumed.save_pretrained(tmp_path)
    found = store.load(tmp_path)
    assert [(gone.index, gone.reason) for gone in found.removed] == [(1, "removed"), (0, "superseded")]
    with pytest.raises(store.ConflictError, match="and 2 removed edits"):
        editor.save_pretrained(tmp_path)
    again = Editor(tiny_model("llama", dtype=torch.float64), tiny_tokenizer(), edits=tmp_path)
    assert torch.equal(logits(again.model), logits(resumed.model))
    with pytest.raises(ValueError, match=r"request 1 of batch .* is not there any more"):
        again.remove(batch.id, 1)


def test_restoring_brings_back_what_was_replaced_and_removed() -> None:
    editor = make(dtype=torch.float64)
    batch = edit(editor, [born("Rome"), *others(2)])
    before, edits = snapshot(editor), editor.edit_set
    edit(editor, [born("Oslo")])
    editor.remove(batch.id, 1)
    editor.restore(edits)
    assert_close(snapshot(editor), before, 1e-9)
    assert editor.edit_set is edits
    other = make(config=CONFIG.replace(mom2_update_weight=6.0), dtype=torch.float64)
    with pytest.raises(ValueError, match="edit_set is none that this editor had"):
        other.restore(edits)


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "edit_sets" / "0.1.0"


@pytest.mark.filterwarnings("ignore:settings by former names:FutureWarning")
@pytest.mark.parametrize("name", ["round_robin", "sequence", "two_batches"])
def test_sets_of_earlier_versions(name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / name, tmp_path / name)
    model = tiny_model("llama")
    model.load_state_dict(load_file(FIXTURES / "model.safetensors"))
    editor = Editor(model, tiny_tokenizer(), edits=tmp_path / name)
    editor.collect_statistics(tiny_texts(12), progress=False)
    batch = editor.ledger[-1]
    old = batch.requests[-1]
    edit(editor, [EditRequest(old.prompt, old.subject, "Cork")])
    left = editor.edit_set.find(batch.id)
    assert left.requests == batch.requests[:-1]
    for mine, theirs in zip(left.layers, batch.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :-1])
    editor.remove(batch.id, 0)
    editor.save_pretrained(tmp_path / name)
    again = store.load(tmp_path / name)
    assert [gone.index for gone in again.removed] == [len(batch.requests) - 1, 0]


def test_a_shared_batch_of_an_earlier_version_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose column is whose was not noted then: an edit in place of one of it is refused at once, naming the batch."""
    monkeypatch.setattr("coachhook_fast.editing.schedule._REQUESTS_A_GROUP", 2)
    editor = make(config=ROUND_ROBIN)
    batch = edit(editor, [born("Rome"), *others(3)])
    layers = tuple(replace(update, requests=None) for update in batch.layers)
    edits = replace(editor.edit_set, batches=(replace(batch, layers=layers),))
    editor.edit_set = edits
    before = snapshot(editor)
    monkeypatch.setattr("coachhook_fast.editing.editor.tokenise_batch", raising(AssertionError))
    for use in (lambda: edit(editor, [born("Oslo")]), lambda: editor.remove(batch.id, 1)):
        with pytest.raises(ValueError, match=f"batch '{batch.id}' was made by an earlier version"):
            use()
    assert editor.edit_set is edits
    assert_same(snapshot(editor), before)
    monkeypatch.undo()
    editor.rollback(batch.id)
    edit(editor, [born("Oslo"), *others(3)])
