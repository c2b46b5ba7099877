"""`round_robin`: each batch edits some of the layers, and the others learn its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, logits, make, snapshot
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, load_edits
from coachhook_fast.editing.keys import KeyCollector
from coachhook_fast.editing.schedule import assign, in_batch_order
from coachhook_fast.request import tokenise_batch

ROUND_ROBIN = CONFIG.replace(layers=(0, 1, 2), round_robin=3)


def test_each_batch_edits_the_layers_whose_turn_it_is() -> None:
    editor = make(config=CONFIG.replace(layers=(0, 1, 2), round_robin=2))
    for index, turn in enumerate([(0, 2), (1,), (0, 2)]):
        assert editor.edit_set.round_robin_order[0] == turn
        before = [hook.get_delta_weight() for hook in editor.hooks]
        edit(editor, facts(2, seed=index))
        after = [hook.get_delta_weight() for hook in editor.hooks]
        changed = [p for p in range(3) if not torch.equal(before[p], after[p])]
        assert tuple(changed) == turn


def test_what_a_batch_does() -> None:
    """The update of the edited layer by its definition, R (C + K Kᵀ + N Nᵀ)⁻¹ K, and C of every layer."""
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(2))
    before = [memory.matrix() for memory in editor.memories]
    deltas = [hook.get_delta_weight().double() for hook in editor.hooks]
    seen: dict[Any, Any] = {}
    edit(editor, facts(3, seed=1), observer=lambda event, layer, **found: seen.setdefault((event, layer), found))
    assert {layer for event, layer in seen if event == "update"} == {0}
    assert seen["values", 0]["V"].shape[1] == 3
    update = seen["update", 0]
    K, N = update["K"], update["N"]
    assert N.shape[1] > 0  # the corpus has other texts that end in the subjects' last tokens
    expected = deltas[0] + update["R"].double() @ torch.linalg.solve(before[0] + K @ K.T + N @ N.T, K).T
    torch.testing.assert_close(editor.hooks[0].get_delta_weight().double(), expected, rtol=1e-4, atol=1e-5)
    for position, memory in enumerate(editor.memories):
        keys = editor.edit_set.batches[-1].layers[position].keys
        assert keys.shape == (memory.matrix().shape[0], 3)
        torch.testing.assert_close(memory.matrix(), before[position] + keys @ keys.T, rtol=1e-9, atol=1e-9)
    assert torch.equal(K, editor.edit_set.batches[-1].layers[0].keys)


def test_others_keys_are_learnt_with_a_small_weight() -> None:
    editor = make(config=ROUND_ROBIN.replace(hard_negatives=0))
    read: dict[int, torch.Tensor] = {}
    collect = KeyCollector.read

    def keep(self: KeyCollector, position: int, last: int | None = None) -> Any:
        found = collect(self, position, last)
        read[position] = found.keys
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyCollector, "read", keep)
        batch = edit(editor, facts(3))
    assert [update.residuals.shape[1] for update in batch.layers] == [0, 3, 0]
    for position, share in enumerate((0.03, 1.0, 0.03)):
        expected = read[position].double() * share**0.5
        torch.testing.assert_close(batch.layers[position].keys, expected)


def test_a_large_batch_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer changes for its own requests, by the definition, and learns the keys of all; outcomes are in order."""
    monkeypatch.setattr("coachhook_fast.editing.schedule._REQUESTS_A_GROUP", 2)
    editor = make(config=ROUND_ROBIN.replace(hard_negatives=0))
    edit(editor, facts(1, seed=9))  # the middle layer has had its turn
    before = [memory.matrix() for memory in editor.memories]
    deltas = [hook.get_delta_weight().double() for hook in editor.hooks]
    seen: dict[Any, Any] = {}
    requests = facts(5)
    batch = edit(editor, requests, observer=lambda event, layer, **found: seen.setdefault((event, layer), found))
    assert batch.requests == tuple(requests)
    assert [update.residuals.shape[1] for update in batch.layers] == [2, 1, 2]
    for position, memory in enumerate(editor.memories):
        update, own = seen["update", position], batch.layers[position].residuals.shape[1]
        K, N, R = update["K"], update["N"], update["R"].double()
        assert K.shape[1] == 5
        X = torch.linalg.solve(before[position] + K @ K.T + N @ N.T, K)[:, :own]
        found = editor.hooks[position].get_delta_weight().double() - deltas[position]
        torch.testing.assert_close(found, R @ X.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(memory.matrix(), before[position] + K @ K.T, rtol=1e-9, atol=1e-9)
        assert K[:, own:].norm() < K[:, :own].norm()  # the others' share
    # leverages are of each request's own key, whatever the order of a layer's columns
    for position in range(3):
        own_first = {0: 0, 2: 2, 1: 4}[position]
        K = seen["update", position]["K"][:, 0]
        expected = K @ torch.linalg.solve(before[position], K)
        assert batch.outcomes[own_first].leverage[position] == pytest.approx(float(expected), rel=1e-6)


def test_a_shared_batch_is_rolled_back_saved_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coachhook_fast.editing.schedule._REQUESTS_A_GROUP", 2)
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(2, seed=9))
    before = snapshot(editor)
    batch = edit(editor, facts(6))
    editor.save_pretrained(tmp_path)
    model = tiny_model("llama")
    load_edits(model, tmp_path)
    assert torch.equal(logits(model), logits(editor.model))
    editor.rollback(batch.id)
    for one, other in zip(snapshot(editor), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_requests_about_one_subject_share_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coachhook_fast.editing.schedule._REQUESTS_A_GROUP", 2)
    editor = make(config=ROUND_ROBIN)
    subject = facts(1)[0].subject
    twice = [EditRequest(prompt="{} lives in", subject=subject, target_new="Rome"), *facts(5)]
    batch = tokenise_batch(twice, tiny_tokenizer(), editor.edit_set.contexts, None)
    assignments = assign(editor.edit_set, batch)
    assert sorted(index for part in assignments for index in part.requests) == list(range(6))
    assert next(part.requests for part in assignments if 0 in part.requests)[:2] == (0, 1)
    assert len(assignments) == 3
    values = [torch.full((2, len(part.requests)), 0.0) + torch.tensor(part.requests) for part in assignments]
    assert in_batch_order(values, assignments)[0].tolist() == list(range(6))


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (16, 1), (17, 2), (40, 3), (49, 3)])
def test_how_many_layers_a_batch_takes(count: int, parts: int) -> None:
    editor = make(config=ROUND_ROBIN)
    requests = [EditRequest(prompt="{} works as a", subject=f"Ada {i}", target_new="pilot") for i in range(count)]
    batch = tokenise_batch(requests, tiny_tokenizer(), editor.edit_set.contexts, None)
    assignments = assign(editor.edit_set, batch)
    assert len(assignments) == parts
    sizes = [len(part.requests) for part in assignments]
    assert max(sizes) - min(sizes) <= 1


def test_thresholds_look_at_the_edits_of_their_own_layer() -> None:
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(2))
    assert [hook.threshold == float("inf") for hook in editor.hooks] == [True, False, True]
    assert [editor.edit_set.edit_keys(p).shape[1] for p in range(3)] == [0, 2, 0]


def test_the_residual_is_that_of_the_layer_in_turn() -> None:
    """With the gate open, what the outcome calls left is what the block's output lacks of the target value."""
    editor = make(config=ROUND_ROBIN.replace(threshold_z=1e-6, mom2_update_weight=1e-3, hard_negatives=0))
    for index in range(3):
        batch = edit(editor, facts(2, seed=index))
        assert max(outcome.residual_left for outcome in batch.outcomes) < 0.5


def test_rollback_save_and_load(tmp_path: Path) -> None:
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(2))
    edit(editor, facts(2, seed=1))
    before = snapshot(editor)
    batch = edit(editor, facts(2, seed=2))
    editor.save_pretrained(tmp_path)
    again = make(config=ROUND_ROBIN)
    answers = logits(editor.model)
    again.unload()
    reloaded = Editor(again.model, tiny_tokenizer(), edits=tmp_path)
    assert torch.equal(logits(reloaded.model), answers)
    editor.rollback(batch.id)
    for one, other in zip(snapshot(editor), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    first = editor.ledger[0]
    editor.rollback(first.id)  # out of order: layer 1 is as it came, and the next in turn
    assert editor.hooks[1].threshold == float("inf")
    assert editor.hooks[0].delta.rank > 0
    assert editor.edit_set.round_robin_order[0] == (1,)


def test_a_set_whose_layers_have_not_all_had_their_turn(tmp_path: Path) -> None:
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(1))
    editor.save_pretrained(tmp_path)
    model = tiny_model("llama")
    load_edits(model, tmp_path)
    assert torch.equal(logits(model), logits(editor.model))
    assert [hook.delta.rank > 0 for hook in model.coachhook.hooks] == [False, True, False]


def test_turns_begin_in_the_middle() -> None:
    editor = make(config=CONFIG.replace(layers=(0, 1, 2), round_robin=3))
    edited = []
    for seed in range(4):
        edited.append(editor.edit_set.round_robin_order[0])
        edit(editor, facts(1, seed=seed))
    assert edited == [(1,), (0,), (2,), (1,)]


def test_the_turn_goes_to_the_layers_with_the_fewest_edits() -> None:
    editor = make(config=CONFIG.replace(layers=(0, 1), round_robin=2))
    edited = []
    for first, size in ((0, 3), (3, 1), (4, 1), (5, 1), (6, 1)):
        edited.append(editor.edit_set.round_robin_order[0])
        edit(editor, facts(7)[first : first + size])
    assert edited == [(0,), (1,), (1,), (1,), (0,)]


def test_one_turn_is_the_paper() -> None:
    editors = [make(config=CONFIG), make(config=CONFIG.replace(round_robin=1))]
    for editor in editors:
        edit(editor, facts(3))
    assert_same(snapshot(editors[0]), snapshot(editors[1]))
    assert all(update.residuals.shape[1] == 3 for update in editors[0].edit_set.batches[0].layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round_robin": 0}, "round_robin"),
        ({"round_robin": 1.5}, "round_robin"),
        ({"layers": (1, 2), "round_robin": 3}, "at most the number of layers"),
        ({"round_robin": 2, "gate": "sequence"}, "'sequence'"),
        ({"threshold_relative": True, "gate": "sequence"}, "threshold_relative"),
        ({"threshold_relative": 1}, "threshold_relative must be true, false or null, got 1"),
        ({"threshold_whitened": True, "gate": "sequence"}, "threshold_whitened must be false"),
        ({"threshold_whitened": 1}, "threshold_whitened must be true, false or null, got 1"),
    ],
)
def test_bad_turns(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        EditConfig(**settings)


@pytest.mark.parametrize("changed", [{"round_robin": 1}, {"threshold_whitened": False}])
def test_going_on_with_other_turns_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    editor = make(config=ROUND_ROBIN)
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path)
    editor.unload()
    with pytest.raises(ValueError, match=next(iter(changed))):
        Editor(editor.model, tiny_tokenizer(), ROUND_ROBIN.replace(**changed), edits=tmp_path)
