"""Editor: a batch goes in whole or not at all, and is undone whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, interrupt_target, logits, make, raising, snapshot
from tiny import tiny_tokenizer

from coachhook_fast import Editor
from coachhook_fast.editing.key_memory import KeyMemory


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["solve", "late solve", "outcomes"])
def test_a_failed_batch_leaves_everything_as_it_was(
    gate: str, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(config=CONFIG.replace(gate=gate))
    edit(editor, facts(2))
    before, ledger = snapshot(editor), editor.ledger
    if where == "outcomes":
        monkeypatch.setattr("coachhook_fast.editing.editor.outcomes_of", raising(error))
    else:
        failing = editor.memories[1 if where == "late solve" else 0]
        monkeypatch.setattr(failing, "solve", raising(error))
    with pytest.raises(error):
        edit(editor, facts(3, seed=1))
    monkeypatch.undo()
    assert_same(snapshot(editor), before)
    assert editor.ledger == ledger
    assert [hook.mode for hook in editor.hooks] == ["gated", "gated"]
    edit(editor, facts(3, seed=1))
    assert len(editor.ledger) == 2


def test_ctrl_c_during_the_commit_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    editor = make()
    real = KeyMemory.update

    def interrupted(self: KeyMemory, K: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self, K)

    monkeypatch.setattr(KeyMemory, "update", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells start us with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            edit(editor, facts(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(editor.ledger) == 1  # the batch went in whole before the interrupt took effect
    assert editor.hooks[0].delta.rank > 0


def test_ctrl_c_within_a_forward_pass_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make()
    edit(editor, facts(2))
    before, solve = snapshot(editor), KeyMemory.solve
    seen: list[Any] = []

    def interrupting_solve(self: KeyMemory, keys: torch.Tensor) -> Any:
        if not seen:  # the next pass over the model, which reads the second layer's keys, is interrupted
            block = editor.model.model.layers[2]  # type: ignore[union-attr,index]
            seen.append(block.register_forward_pre_hook(raising(KeyboardInterrupt)))
        return solve(self, keys)

    monkeypatch.setattr(KeyMemory, "solve", interrupting_solve)
    with pytest.raises(KeyboardInterrupt):
        edit(editor, facts(4)[2:])
    seen[0].remove()
    assert {hook.mode for hook in editor.hooks} == {"gated"}
    assert_same(snapshot(editor), before)
    edit(editor, facts(4)[2:])
    assert not torch.equal(logits(editor.model), before[-1])


def test_a_memory_that_fails_in_the_commit_takes_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(dtype=torch.float64)
    edit(editor, facts(2))
    before = snapshot(editor)
    monkeypatch.setattr(editor.memories[1], "update", raising(MemoryError))
    with pytest.raises(MemoryError):
        edit(editor, facts(4)[2:])
    for one, other in zip(snapshot(editor), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert len(editor.ledger) == 1


def test_editing_while_disabled_goes_on_top_of_the_earlier_edits() -> None:
    one, other = make(), make()
    for editor in (one, other):
        edit(editor, facts(2))
    edit(one, facts(4)[2:])
    with other.disabled():
        edit(other, facts(4)[2:])
        assert {hook.mode for hook in other.hooks} == {"off"}
    assert_same(snapshot(one), snapshot(other))


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_rolling_back_the_last_batch_gives_the_state_before_it(gate: str) -> None:
    editor = make(config=CONFIG.replace(gate=gate))
    edit(editor, facts(2))
    before = snapshot(editor)
    batch = edit(editor, facts(3, seed=1))
    assert not torch.equal(snapshot(editor)[-1], before[-1]) or not torch.equal(snapshot(editor)[2], before[2])
    editor.rollback(batch.id)
    after = snapshot(editor)
    for memory, wanted in zip(after[:2], before[:2], strict=True):
        torch.testing.assert_close(memory, wanted, rtol=1e-9, atol=1e-9)
    assert_same(after[2:], before[2:])
    with pytest.raises(ValueError, match=f"batch_id '{batch.id}' is not in the ledger"):
        editor.rollback(batch.id)


def test_rolling_back_a_batch_in_the_middle_leaves_the_others() -> None:
    editor = make()
    batches = [edit(editor, facts(2, seed=seed)) for seed in (0, 1, 2)]
    kept = [editor.edit_set.batches[0], editor.edit_set.batches[2]]
    editor.rollback(batches[1].id)
    for position, hook in enumerate(editor.hooks):
        wanted = sum(b.layers[position].residuals @ b.layers[position].directions.T for b in kept)
        torch.testing.assert_close(hook.get_delta_weight(), wanted, rtol=1e-4, atol=1e-5)
    for batch in kept:
        editor.rollback(batch.id)
    with editor.disabled():
        clean = logits(editor.model)
    assert torch.equal(logits(editor.model), clean)
    assert editor.hooks[0].delta.rank == 0


def test_rollbacks_in_any_order_leave_the_same_thresholds() -> None:
    editors = make(), make()
    for editor, order in zip(editors, ((0, 2), (2, 0)), strict=True):
        ids = [edit(editor, facts(6)[start : start + 2]).id for start in (0, 2, 4)]
        for position in order:
            editor.rollback(ids[position])
    for one, other in zip(editors[0].hooks, editors[1].hooks, strict=True):
        torch.testing.assert_close(one.get_delta_weight(), other.get_delta_weight())
        assert one.threshold == pytest.approx(other.threshold, rel=1e-5)


def test_an_unloaded_editor_touches_no_other_editors_hooks() -> None:
    stale = make()
    model = stale.unload()
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    for use in (stale.unload, lambda: stale.edit(facts(1)), lambda: stale.rollback("x")):
        with pytest.raises(ValueError, match="were unloaded"):
            use()
    assert model.coachhook.hooks == editor.hooks  # type: ignore[union-attr]


@pytest.mark.slow
def test_targets_found_before_an_interrupt_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make(config=CONFIG.replace(max_batch_tokens=1))
    asked = interrupt_target(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        edit(editor, facts(4))
    batch = edit(editor, facts(4))
    assert len(asked) == 3 + 2  # two were known
    untroubled = edit(make(config=CONFIG.replace(max_batch_tokens=1)), facts(4))
    for one, other in zip(batch.layers, untroubled.layers, strict=True):
        torch.testing.assert_close(one.residuals, other.residuals, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_a_trial_answers_as_the_edit_would_and_leaves_nothing(gate: str) -> None:
    editor = make(config=CONFIG.replace(gate=gate))
    edit(editor, facts(2))
    before, edit_set = snapshot(editor), editor.edit_set
    editor.disable()
    with editor.trial(facts(3, seed=1), progress=False) as batch:
        tried = logits(editor.model)
        assert editor.edit_set is edit_set
    assert [hook.mode for hook in editor.hooks] == ["off", "off"]  # as they were
    editor.enable()
    assert editor.edit_set is edit_set
    assert_same(snapshot(editor), before)
    made = edit(editor, facts(3, seed=1))
    assert torch.equal(logits(editor.model), tried)
    assert not torch.equal(tried, before[-1])
    assert [outcome.answer for outcome in made.outcomes] == [outcome.answer for outcome in batch.outcomes]


def test_an_error_before_the_commit_leaves_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service saves there: a full disk must not leave the model ahead of it, or behind."""
    editor = make()
    first = edit(editor, facts(2))
    before, edit_set = snapshot(editor), editor.edit_set
    seen: list[Any] = []

    def full(edited: Any) -> None:
        seen.append(len(edited.batches))
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        edit(editor, facts(3, seed=1), before_commit=full)
    with pytest.raises(OSError, match="no space"):
        editor.rollback(first.id, before_commit=full)
    assert seen == [2, 0]
    assert editor.edit_set is edit_set
    for one, other in zip(snapshot(editor), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)  # a memory is updated and downdated again
    assert_same(snapshot(editor)[len(editor.memories) :], before[len(editor.memories) :])
    editor.rollback(first.id, before_commit=lambda rest: seen.append(len(rest.batches)))
    assert seen == [2, 0, 0]
    assert editor.ledger == ()
