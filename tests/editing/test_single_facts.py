"""Single facts: removed, or edited again in place of the old edit, as if that had never been (method.md section 7)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, assert_same, edit, facts, logits, make, raising, snapshot
from safetensors.torch import load_file
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, NotSaidError
from coachhook_fast.cli import main
from coachhook_fast.editing.calibration import calibrate
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.single_facts import superseded
from coachhook_fast.edits import store

ROUND_ROBIN = CONFIG.replace(layers=(0, 1, 2), round_robin=3)
CONFIGS = {
    "calibrated": CONFIG.replace(v_num_grad_steps=3),
    "sequence": CONFIG.replace(v_num_grad_steps=3, gate="sequence"),
    "round_robin": ROUND_ROBIN.replace(v_num_grad_steps=3),
    "round_robin 2": CONFIG.replace(layers=(0, 1, 2), round_robin=2, v_num_grad_steps=3, threshold_rule="edit_keys"),
}
# Edits that go in whole: then a random model says those of `home`, one token behind the subject's last.
STRONG = CONFIG.replace(
    mom2_update_weight=0.01, threshold_rule="fpr", threshold_fpr=0.99, context_seeds=(), subject_templates=(),
    v_num_grad_steps=60,
)  # fmt: skip
CHANGES = 50


def born(city: str, *, prompt: str = "{} was born in", subject: str = "Ada Vale", **more: Any) -> EditRequest:
    return EditRequest(prompt, subject, city, **more)


def home(letter: str, **more: Any) -> EditRequest:
    return EditRequest("The home of {}", "Ada Vale", letter, **more)


def others(n: int) -> list[EditRequest]:
    found = facts(n + 4)
    return [request for request in found if request.subject != "Ada Vale"][:n]


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ edited again


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
    from coachhook_fast.editing.targets import optimise

    config = CONFIG.replace(max_batch_tokens=1)
    editor, untroubled = make(config=config), make(config=config)
    requests = [born("Oslo"), *others(3)]
    for one in (editor, untroubled):
        edit(one, [born("Rome")])
    asked: list[int] = []
    real = optimise.TargetRows.build.__func__  # type: ignore[attr-defined]

    def build(cls: Any, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(cls, *args)

    monkeypatch.setattr(optimise.TargetRows, "build", classmethod(build))
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


# ------------------------------------------------------------------ removed


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


# ------------------------------------------------------------------ earlier versions

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "edit_sets"


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


# ------------------------------------------------------------------ what is said


def test_check_asks_prompts_and_paraphrases() -> None:
    editor = make(config=STRONG)
    mine = home("w", paraphrases=("Where is the home of {}", "{} lives in"))
    first, second = edit(editor, [mine, *others(1)]), edit(editor, others(2)[1:])
    editor.remove(first.id, 1)
    modes = editor._handle.modes
    with editor.disabled():
        found = editor.check()
    assert editor._handle.modes == modes
    places = [(fact.batch, fact.index, fact.request) for fact in found]
    assert places == [(first.id, 0, mine), (second.id, 0, second.requests[0])]
    assert [answer.text for answer in found[0].paraphrases] == ["Where is the home of Ada Vale", "Ada Vale lives in"]
    for fact in found:
        for answer in (fact.prompt, *fact.paraphrases):
            said = greedy(editor, answer.text, fact.request.target_new)
            assert answer.said == (said == f" {fact.request.target_new}")
            assert said.startswith(answer.answer)
        assert fact.said == all(answer.said for answer in (fact.prompt, *fact.paraphrases))
    assert found[0].prompt.said
    assert not found[1].prompt.said


@torch.no_grad()
def greedy(editor: Editor, text: str, target: str) -> str:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, return_tensors="pt").input_ids
    count = len(tokenizer(f" {target}").input_ids)
    made = editor.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)  # type: ignore[operator]
    return str(tokenizer.decode(made[0, ids.shape[1] :]))


def test_a_batch_that_must_be_said_is_or_changes_nothing() -> None:
    editor = make(config=STRONG)
    edit(editor, [home("w")], require_said=True)
    before, edits = snapshot(editor), editor.edit_set
    words = r"1 of 2 edits are not said: 'The home of Ada Vale' -> 'Rome' \(the model answers '.*'\)$"
    with pytest.raises(NotSaidError, match=words):
        edit(editor, [home("Rome"), EditRequest("The home of {}", "Mira Sato", "m")], require_said=True)
    assert_same(snapshot(editor), before)
    assert editor.edit_set is edits
    edit(editor, [home("Rome")])
    assert [request.target_new for request in editor.edit_set.requests] == ["Rome"]


def test_the_defaults_take_a_changed_fact() -> None:
    """The settings of a new user, round-robin and whitened, on a tiny model."""
    editor = make(config=EditConfig(mom2_n_tokens=600, threshold_keys=64, v_num_grad_steps=2))
    for city in ("Rome", "Oslo", "Rome"):
        edit(editor, [born(city)])
    assert [batch.requests[0].target_new for batch in editor.ledger] == ["Rome"]
    assert sum(delta.rank for delta in editor.edit_set.deltas) == 1
