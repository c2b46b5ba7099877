"""Whether facts are said: `check`, `require_said`, and what a new user's settings make of a changed fact."""

from __future__ import annotations

import pytest
import torch
from editor_cases import assert_same, edit, make, snapshot
from single_fact_cases import STRONG, born, home, others
from tiny import tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, NotSaidError


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
