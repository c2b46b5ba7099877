"""Facts edited again: the new edit takes the old one's place, as if that had never been (method.md section 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, interrupt_target, make, raising, snapshot
from single_fact_cases import CONFIGS, ROUND_ROBIN, STRONG, assert_close, born, home, others

from coachhook_fast import EditRequest
from coachhook_fast.cli import main
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.single_facts import superseded
from coachhook_fast.edits import store

CHANGES = 50


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_fifty_changes_of_one_fact_leave_what_one_leaves(name: str, tmp_path: Path) -> None:
    once, often = (make(config=CONFIGS[name], dtype=torch.float64) for _ in range(2))
    for editor in (once, often):
        edit(editor, others(3))
    cities = ["Rome", "Berlin"] * (CHANGES // 2)
    for city in cities:
        edit(often, [born(city)])
    edit(once, [born(cities[-1])])
    assert_close(snapshot(often), snapshot(once))  # C, Δ, τ or α, and logits
    for mine, theirs in zip(often.edit_set.deltas, once.edit_set.deltas, strict=True):
        assert float(mine.dense().norm()) == pytest.approx(float(theirs.dense().norm()), rel=1e-6)
        assert (mine.rank, mine.nbytes) == (theirs.rank, theirs.nbytes)
    for mine, theirs in zip(often.edit_set.thresholds, once.edit_set.thresholds, strict=True):
        assert (mine.value, mine.mean, mine.std) == pytest.approx(
            (theirs.value, theirs.mean, theirs.std), rel=1e-6, nan_ok=True
        )
    assert [batch.requests for batch in often.ledger] == [batch.requests for batch in once.ledger]
    assert often.ledger[-1].requests[0].target_new == "Berlin"
    gone = often.edit_set.removed
    assert [one.request.target_new for one in gone] == cities[:-1]
    assert {one.reason for one in gone} == {"superseded"}
    assert [one.by for one in gone[:-1]] == [one.batch for one in gone[1:]]
    assert gone[-1].by == often.ledger[-1].id
    for editor, folder in ((once, tmp_path / "once"), (often, tmp_path / "often")):
        editor.save_pretrained(folder)
        assert main(["verify-edits", str(folder)]) == 0
    assert tensor_bytes(tmp_path / "often") == pytest.approx(tensor_bytes(tmp_path / "once"), abs=64)
    assert store.load(tmp_path / "often").removed == gone


def test_the_latest_answer_is_said_every_time() -> None:
    editor = make(config=STRONG)
    for letter in ("w", "b", "w", "m"):
        edit(editor, [home(letter)])
        (fact,) = editor.check()
        assert (fact.request.target_new, fact.said) == (letter, True)


def test_some_of_a_batch_take_the_place_of_some_of_others() -> None:
    """Against the same edits without the old ones: those stood in the last batch, so nothing was found beside them."""
    one, other = (make(config=ROUND_ROBIN, dtype=torch.float64) for _ in range(2))
    mates = others(4)
    for editor in (one, other):
        edit(editor, mates[:2])
    old = edit(one, [born("Rome"), EditRequest("{} works as a", "Greta Rask", "pilot")])
    new = [born("Oslo"), mates[2], EditRequest("{} works as a", "Greta Rask", "judge")]
    batch = edit(one, new)
    edit(other, new)
    assert_close(snapshot(one), snapshot(other))
    assert [request.target_new for request in batch.requests] == ["Oslo", mates[2].target_new, "judge"]
    assert [(gone.batch, gone.index, gone.by) for gone in one.edit_set.removed] == [
        (old.id, n, batch.id) for n in (0, 1)
    ]


def test_what_is_the_same_fact() -> None:
    editor = make()
    batch = edit(editor, [born("Rome"), EditRequest("The sister of Mira Sato is", "Mira Sato", "Elin")])
    same = {batch.id: [0]}
    held = [
        born("Oslo"), born("Rome", paraphrases=("{} comes from",)), born("Oslo", prompt="Ada Vale  was born in"),
        born("Oslo", subject="ADA  Vale"), born("Oslo", prompt="Ada Vale was born in", subject="Vale"),
    ]  # fmt: skip
    assert [superseded(editor.edit_set, [request]) for request in held] == [same] * len(held)
    assert superseded(editor.edit_set, [EditRequest("The sister of {} is", "Mira Sato", "Ada")]) == {batch.id: [1]}
    apart = [
        born("Rome"), born("Rome "), born("Oslo", subject="Ada Sato"), born("Oslo", prompt="{} lives in"),
        born("Oslo", prompt="{} was born in the"),
    ]  # fmt: skip
    assert [superseded(editor.edit_set, [request]) for request in apart] == [{}] * len(apart)


def test_a_repeated_edit_leaves_the_first_and_a_change_takes_both_out() -> None:
    editor = make(config=STRONG)
    clean = snapshot(editor)
    edit(editor, [home("w")])
    edit(editor, [home("w")])
    assert [batch.requests[0].target_new for batch in editor.ledger] == ["w", "w"]
    assert editor.edit_set.removed == ()
    edit(editor, [home("m")])
    assert [batch.requests[0].target_new for batch in editor.ledger] == ["m"]
    editor.rollback(editor.ledger[0].id)  # what it had taken the place of does not come back
    assert_close(snapshot(editor), clean, 1e-9)
    assert [gone.reason for gone in editor.edit_set.removed] == ["superseded", "superseded", "rolled back"]


def test_the_old_answer_is_not_held_while_the_new_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = make()
    edit(
        editor,
        [born("Rome", prompt="Ada Vale was born in", subject="Vale"), EditRequest("{} works as a", "Vale", "pilot")],
    )
    seen: list[Any] = []
    real = editor._without

    def without(replaced: Any) -> Any:
        seen.append(replaced)
        return real(replaced)

    monkeypatch.setattr(editor, "_without", without)
    from coachhook_fast.editing import editor as module

    tokenise = module.tokenise_batch
    held: list[list[str]] = []

    def tokenise_batch(*arguments: Any, earlier: Any, **options: Any) -> Any:
        held.append([request.target_new for request in earlier])
        return tokenise(*arguments, earlier=earlier, **options)

    monkeypatch.setattr(module, "tokenise_batch", tokenise_batch)
    edit(editor, [born("Oslo")])
    assert held == [["pilot"]]
    assert [list(places.values()) for places in seen] == [[[0]]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["downdate", "calibrate", "targets", "solve", "outcomes", "update", "publish"])
def test_a_change_that_fails_leaves_the_old_edit(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = make(config=ROUND_ROBIN)
    edit(editor, [born("Rome"), others(1)[0]])
    edit(editor, others(3)[1:])
    before, edits, memories = snapshot(editor), editor.edit_set, editor.memories
    module = "coachhook_fast.editing"
    calls: list[int] = []

    def late(real: Any, at: int) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise error
            return real(*arguments)

        return call

    if where in ("downdate", "update", "solve"):  # the second layer's
        monkeypatch.setattr(KeyMemory, where, late(getattr(KeyMemory, where), 2))
    elif where == "calibrate":
        monkeypatch.setattr(f"{module}.calibration.calibrate", raising(error))
    elif where == "publish":  # the commit's own: the third, after those of the start and of the layer's update
        monkeypatch.setattr(editor._handle, "publish", late(editor._handle.publish, 3))
    else:
        name = {"targets": "optimise", "outcomes": "outcomes_of"}[where]
        monkeypatch.setattr(f"{module}.editor.{name}", raising(error))
    with pytest.raises(error):
        edit(editor, [born("Oslo")])
    monkeypatch.undo()
    assert_same(snapshot(editor), before)
    assert editor.edit_set is edits
    assert editor.memories is memories
    assert {hook.mode for hook in editor.hooks} == {"gated"}
    edit(editor, [born("Oslo")])
    assert [request.target_new for request in editor.edit_set.requests if request.subject == "Ada Vale"] == ["Oslo"]


def test_targets_of_a_change_that_was_interrupted_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(max_batch_tokens=1)
    editor, untroubled = make(config=config), make(config=config)
    requests = [born("Oslo"), *others(3)]
    for one in (editor, untroubled):
        edit(one, [born("Rome")])
    asked = interrupt_target(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        edit(editor, requests)
    assert editor.ledger[0].requests[0].target_new == "Rome"
    edit(editor, requests)
    assert len(asked) == 3 + 2  # two were known
    monkeypatch.undo()
    edit(untroubled, requests)
    assert_close(snapshot(editor), snapshot(untroubled), 1e-4)


def test_targets_found_beside_a_fact_are_not_taken_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch keeps its id when it loses a request: targets kept from before are of another state."""
    editor = make()
    batch = edit(editor, [born("Rome"), others(1)[0]])
    monkeypatch.setattr("coachhook_fast.editing.editor.outcomes_of", raising(RuntimeError))
    with pytest.raises(RuntimeError):
        edit(editor, others(2)[1:])
    monkeypatch.undo()
    editor.remove(batch.id, 0)
    found: list[int] = []
    from coachhook_fast.editing import editor as module

    class Cache(module.TargetCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found.append(len(self.found))

    monkeypatch.setattr(module, "TargetCache", Cache)
    edit(editor, others(2)[1:])
    assert found == [0]
