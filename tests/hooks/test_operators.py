"""Operators in several threads: none undoes what another asked, none loses what another published."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from swap_cases import LAYERS, alone, edit_set, logits, model_with
from tiny import tiny_model

ROUNDS = 300


def together(*calls: Callable[[], Any]) -> None:
    """All at once, each in a thread of its own; the first error of one is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(calls))

    def work(call: Callable[[], Any]) -> None:
        try:
            barrier.wait(60)
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("ask", ["disable", "enable"])
def test_what_is_asked_within_anothers_block_holds_after_it(ask: str) -> None:
    hooks = model_with().coachhook
    hooks.publish(edit_set(1, 4))
    getattr(hooks, "enable" if ask == "disable" else "disable")()
    with hooks.disabled():
        together(getattr(hooks, ask))
        assert hooks.modes == ["off"] * len(LAYERS)  # the block keeps its promise
    assert hooks.modes == ["off" if ask == "disable" else "gated"] * len(LAYERS)


def test_switches_of_many_threads_end_as_the_last_one_asked() -> None:
    hooks = model_with().coachhook

    def hold() -> None:
        for _ in range(ROUNDS):
            with hooks.disabled():
                assert hooks.modes == ["off"] * len(LAYERS)

    def ask() -> None:
        for _ in range(ROUNDS):
            hooks.enable()
            hooks.disable()

    together(hold, hold, ask)
    assert hooks.modes == ["off"] * len(LAYERS)
    hooks.enable()
    assert hooks.modes == ["gated"] * len(LAYERS)


def test_reserve_beside_publish_loses_no_version() -> None:
    sets = [edit_set(0, 2), edit_set(1, 5)]
    versions = [alone(edits) for edits in sets]
    model = model_with()
    for round_ in range(ROUNDS):
        new = sets[round_ % 2]
        together(
            lambda rank=8 + round_ % 3: model.coachhook.reserve(rank), lambda new=new: model.coachhook.publish(new)
        )
        assert model.coachhook.edit_set is new
        assert {entry.state.B.shape[0] for entry in model.coachhook._versions.published()} == {8 + round_ % 3}
        if round_ % 10 < 2:
            torch.testing.assert_close(logits(model), versions[round_ % 2], rtol=1e-4, atol=1e-4)


def test_publish_beside_publish_serves_the_set_it_names() -> None:
    sets = [edit_set(0, 2), edit_set(1, 2)]
    model = model_with()
    for _ in range(ROUNDS):
        together(*(partial(model.coachhook.publish, edits) for edits in sets))
        served = model.coachhook.edit_set
        assert torch.equal(model.coachhook.hooks[0].served.state.B, served.deltas[0].B)


def test_sets_that_come_and_go_together_are_all_there() -> None:
    model, edits = model_with(), edit_set(0, 2)
    for _ in range(ROUNDS // 10):
        together(*(partial(model.coachhook.add_edits, name, edits) for name in "abc"))
        assert set(model.coachhook.adapters) == set("abc")
        together(*(partial(model.coachhook.remove_edits, name) for name in "abc"))
        assert model.coachhook.adapters == ()


def test_an_editors_modes_go_before_what_operators_ask() -> None:
    hooks = model_with().coachhook
    hooks.force_modes(["always"] * len(LAYERS))
    with hooks.disabled():
        assert hooks.modes == ["always"] * len(LAYERS)
        hooks.disable()
    hooks.force_modes(None)
    assert hooks.modes == ["off"] * len(LAYERS)
    with pytest.raises(ValueError, match="mode must be one of"):
        hooks.force_modes(["on"] * len(LAYERS))


def test_a_copy_made_within_a_block_is_in_nobodys_block() -> None:
    model = model_with()
    model.coachhook.publish(edit_set(1, 4))
    with model.coachhook.disabled():
        copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(tiny_model("llama")))
    copied.coachhook.enable()
    assert torch.equal(logits(copied), alone(edit_set(1, 4)))


def test_no_edit_set_is_named_where_a_hook_has_a_delta_of_its_own() -> None:
    model, edits = model_with(), edit_set(1, 4)
    model.coachhook.publish(edits)
    model.coachhook.hooks[2].set_delta(edits.deltas[2], 1.0)
    assert model.coachhook.edit_set is None
    model.coachhook.reserve(8)  # keeps the delta
    assert model.coachhook.hooks[2].threshold == 1.0
    assert model.coachhook.hooks[1].threshold == 0.5


@pytest.mark.parametrize("modes", [[], ["gated"], ["gated"] * 9, "off", ["gated"] * 3 + ["on"], None])
def test_modes_that_do_not_fit_the_hooks_change_nothing(modes: Any) -> None:
    model = model_with()
    model.coachhook.publish(edit_set(0, 2))
    before, found = model.coachhook.modes, logits(model)
    with pytest.raises(ValueError, match="mode"):
        model.coachhook.set_modes(modes)
    if modes is not None:
        with pytest.raises(ValueError, match="mode"):
            model.coachhook.force_modes(modes)
    assert model.coachhook.modes == before
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("rank", [True, 2.5, "3", None])
def test_a_rank_to_reserve_is_an_integer(rank: Any) -> None:
    model = model_with()
    with pytest.raises(TypeError, match="rank must be an integer"):
        model.coachhook.reserve(rank)
