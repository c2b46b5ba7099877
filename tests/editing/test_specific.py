"""Edits that are specific: wordings, prompts to keep, earlier facts of a subject, and normalised descent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make
from tiny import tiny_tokenizer

from coachhook_fast.config import PAPER, SPECIFIC, EditConfig
from coachhook_fast.editing.targets.descent import NormalisedDescent
from coachhook_fast.editing.targets.wordings import read_wordings
from coachhook_fast.request import EditRequest, tokenise_batch


def test_descent_is_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    count, width, steps = 5, 7, 6
    lengths, bounds = torch.rand(count) + 0.1, torch.rand(count) + 0.2
    descent = NormalisedDescent(lengths, bounds, width, steps)
    rows, mean = torch.zeros(count, width), torch.zeros(count, width)
    going = torch.tensor([True, True, False, True, True])
    for step in range(steps + 3):
        gradients = torch.randn(count, width)
        descent.step(gradients, going)
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * step / (steps - 1))) / 2 if step < steps else 0.4
        for row in range(count):
            mean[row] = 0.5 * mean[row] + 0.5 * gradients[row]
            if going[row]:
                moved = rows[row] - lengths[row] * share * mean[row] / mean[row].norm()
                rows[row] = moved * min(1.0, float(bounds[row] / moved.norm()))
    torch.testing.assert_close(descent.rows.detach(), rows)
    assert bool((descent.rows[2] == 0).all())


def test_every_wording_has_one_slot_and_no_two_are_alike_in_one_question() -> None:
    bank = read_wordings()
    assert len(bank) > 200
    assert all(wording.text.count("{}") == 1 for wording in bank)
    assert len({(wording.kind, wording.relation, wording.text) for wording in bank}) == len(bank)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("paraphrases", "text", TypeError),
        ("paraphrases", [1], TypeError),
        ("keep", ["  "], ValueError),
        ("keep", ["nobody is here"], ValueError),
        ("paraphrases", ["{} and {}"], ValueError),
        ("keep", ["{} works as a"], ValueError),
    ],
)
def test_other_prompts_are_checked_like_the_prompt(name: str, value: Any, error: type[Exception]) -> None:
    fact: dict[str, Any] = {"prompt": "{} works as a", "subject": "Ada Vale", "target_new": "pilot"}
    with pytest.raises(error, match=name):
        EditRequest(**fact, **{name: value})


def test_earlier_facts_of_a_subject_are_held_but_not_those_asked_anew() -> None:
    tokenizer = tiny_tokenizer()
    old = [
        EditRequest("It is said that {} works as a", "Ada Vale", "pilot"),
        EditRequest("It is said that {} was born in", "Ada Vale", "Oslo"),
        EditRequest("It is said that {} was born in", "Bo Lind", "Rome"),
    ]
    new = EditRequest("It is said that {} works as a", "ada  vale", "baker")
    other = EditRequest("It is said that {} works as a", "Cy Dorn", "baker")
    mine, others = tokenise_batch([new, other], tokenizer, ["So"], None, earlier=old)
    assert [row.target for row in mine.held] == [old[1].tokenise(tokenizer, []).bare.target]
    assert others.held == ()


def test_paper_and_specific_name_settings_that_there_are() -> None:
    assert EditConfig(**SPECIFIC).specific
    assert not EditConfig(**PAPER).specific


def test_a_specific_edit_goes_in_and_says_what_is_said() -> None:
    editor = make(config=CONFIG.replace(**SPECIFIC, v_num_grad_steps=4))
    base = logits(editor.model)
    batch = edit(editor, facts(3))
    for outcome in batch.outcomes:
        assert outcome.said in (True, False)
        assert outcome.said is False or outcome.answer.strip() == outcome.request.target_new
        assert outcome.said_paraphrases is None or 0 <= outcome.said_paraphrases <= 1
    editor.rollback(batch.id)
    assert torch.equal(logits(editor.model), base)
