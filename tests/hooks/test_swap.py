"""Hot swap: publish, switch and roll back while other threads run the model. Each pass sees one whole version."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from swap_cases import LAYERS, Load, alone, edit_set, logits, model_with
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor

from coachhook_fast import EditConfig, Editor, EditRequest
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.hooks.shared_weights import shared_weight_copy
from coachhook_fast.hooks.states import Switch
from coachhook_fast.models.architectures import layout_of

GATES = ("calibrated", "sequence")
SWAPS = 300


@pytest.mark.parametrize("gate", GATES)
def test_every_pass_under_load_is_of_one_version(gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions of other ranks, enabled and disabled in turn."""
    sets = [edit_set(seed, rank, gate) for seed, rank in ((0, 2), (1, 5), (2, 3))]
    model = model_with(gate)
    versions = [*(alone(edits) for edits in sets), alone(None)]
    apart = min(float((a - b).abs().max()) for i, a in enumerate(versions) for b in versions[:i])
    assert apart > 0.05  # a mixture could not pass for one of them
    model.coachhook.publish(sets[0])
    with Load(lambda: logits(model), versions) as load:
        for swap in range(SWAPS):
            if swap % 4 == 3:
                with model.coachhook.disabled():
                    threading.Event().wait(0.002)
            else:
                model.coachhook.publish(sets[swap % 4])
                threading.Event().wait(0.002)
    assert not load.problems, load.problems[:2]
    assert sum(count > 0 for count in load.passes) >= 3
    with capsys.disabled():
        print(f"\n  hot swap/{gate}: {SWAPS} swaps under {sum(load.passes)} passes in 3 threads, none mixed")


def test_a_change_under_way_loses_none_of_another_thread() -> None:
    """One thread switches off, and while it is at that another publishes: neither undoes the other."""
    model = model_with()
    begun, go_on = threading.Event(), threading.Event()

    def slowly_off(_: int, entry: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return replace(entry, switch=Switch("off"))

    switching = threading.Thread(target=model.coachhook._versions.change, args=(slowly_off,))
    publishing = threading.Thread(target=model.coachhook.publish, args=(edit_set(1, 5),))
    switching.start()
    assert begun.wait(10)
    publishing.start()
    publishing.join(0.1)
    go_on.set()
    switching.join()
    publishing.join()
    assert model.coachhook.modes == ["off"] * len(LAYERS)
    model.coachhook.enable()
    assert torch.equal(logits(model), alone(edit_set(1, 5)))


def test_a_pass_under_way_keeps_its_version() -> None:
    """Swapped in the middle of a pass, between two edited layers: the pass goes on with what it began with."""
    old, new = edit_set(0, 2), edit_set(1, 5)
    model = model_with()
    model.coachhook.publish(old)

    def swap(*_: Any) -> None:
        model.coachhook.publish(new)

    handle = model.model.layers[LAYERS[1]].register_forward_hook(swap)
    assert torch.equal(logits(model), alone(old))
    handle.remove()
    assert torch.equal(logits(model), alone(new))


def test_ctrl_c_in_a_pass_leaves_no_version_pinned() -> None:
    """torch runs no forward hook then, not even those that are always called."""
    model = model_with()
    model.coachhook.publish(edit_set(1, 4))
    down = model.model.layers[2].mlp.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    down.remove()
    model.coachhook.publish(edit_set(2, 3))
    assert torch.equal(logits(model), alone(edit_set(2, 3)))
    model.coachhook.disable()
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_pass_within_a_pass_sees_the_outer_ones_version() -> None:
    model = model_with()
    model.coachhook.publish(edit_set(1, 4))
    inner: list[Tensor] = []

    def publish_and_run(*_: Any) -> None:
        handle.remove()
        model.coachhook.publish(edit_set(2, 3))
        inner.append(logits(model))

    handle = model.model.layers[1].register_forward_pre_hook(publish_and_run)
    outer = logits(model)
    for seen in (outer, *inner):
        assert torch.equal(seen, alone(edit_set(1, 4)))
    assert torch.equal(logits(model), alone(edit_set(2, 3)))


def test_overlapping_disabled_blocks_end_enabled() -> None:
    model = model_with()
    model.coachhook.publish(edit_set(1, 4))
    one, other = model.coachhook.disabled(), model.coachhook.disabled()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(logits(model), logits(tiny_model("llama")))  # the other block still holds
    other.__exit__(None, None, None)
    assert torch.equal(logits(model), alone(edit_set(1, 4)))


def test_an_error_in_a_pass_leaves_no_version_pinned() -> None:
    old, new = edit_set(0, 2), edit_set(1, 5)
    model = model_with()
    model.coachhook.publish(old)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        logits(model)
    handle.remove()
    model.coachhook.publish(new)
    assert torch.equal(logits(model), alone(new))


def test_reserved_rows_change_no_decision() -> None:
    model = model_with()
    edits = edit_set(1, 5)
    model.coachhook.publish(edits)
    plain = logits(model)
    model.coachhook.reserve(12)
    assert model.coachhook.hooks[0].served.state.B.shape[0] == 12
    assert torch.allclose(logits(model), plain, atol=1e-5)
    model.coachhook.publish(replace(edits, deltas=tuple(LowRankDelta.zeros(24, 45) for _ in LAYERS)))
    assert torch.allclose(logits(model), alone(None), atol=1e-5)
    with pytest.raises(ValueError, match="rank must be at least 0"):
        model.coachhook.reserve(24)


def test_an_edit_set_for_other_layers_is_refused_and_the_old_one_stays() -> None:
    model = model_with()
    model.coachhook.publish(edit_set(0, 2))
    before = logits(model)
    other = edit_set(1, 2)
    for wrong in (
        replace(other, config=other.config.replace(layers=(1, 2, 3, 4))),
        replace(other, config=other.config.replace(gate="sequence")),
        replace(other, deltas=(*other.deltas[:3], LowRankDelta.zeros(24, 44))),
        replace(other, thresholds=(*other.thresholds[:3], Threshold(float("nan")))),
    ):
        with pytest.raises(ValueError):
            model.coachhook.publish(wrong)
        assert torch.equal(logits(model), before)


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_editing_a_shared_weight_copy_while_the_model_serves() -> None:
    """An editor at work in one thread on the same weights; the served model changes at the publish alone."""
    model = tiny_model("llama")
    other = shared_weight_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    config = EditConfig(
        layers=LAYERS, v_num_grad_steps=3, mom2_update_weight=10.0, threshold_rule="zscore", threshold_z=1.0
    )
    editor = Editor(other, tiny_tokenizer(), config)
    editor.collect_statistics(tiny_texts(), progress=False)
    with pytest.raises(ValueError, match="hooks already"):
        shared_weight_copy(other)
    Hooks(model, layout_of(model), LAYERS, "calibrated")
    model.coachhook.publish(editor.edit_set)
    versions = [logits(model)]
    with Load(lambda: logits(model), versions, threads=2) as load:
        editor.edit([EditRequest(**fact) for fact in tiny_facts(3)], progress=False)
        assert not load.problems
        versions.append(logits(other))
        model.coachhook.publish(editor.edit_set)
        while not load.problems and load.passes[0] == 0:
            threading.Event().wait(0.01)
    assert not load.problems
    assert torch.allclose(logits(model), versions[-1], atol=1e-5)
    assert not torch.allclose(versions[0], versions[1], atol=1e-3)


@pytest.mark.parametrize("gate", GATES)
def test_a_pinned_thread_keeps_its_version_over_many_passes(gate: str) -> None:
    """What is published meanwhile reaches the other threads alone, and the base is there without `disable()`."""
    old, new = edit_set(0, 2, gate), edit_set(1, 5, gate)
    model = model_with(gate)
    model.coachhook.publish(old)
    found: list[Tensor] = []
    with model.coachhook.pinned():
        model.coachhook.publish(new)
        found.append(logits(model))
        other = threading.Thread(target=lambda: found.append(logits(model)))
        other.start()
        other.join()
        with pytest.raises(ValueError, match="leave"), model.coachhook.pinned():
            pass
    assert torch.equal(found[0], alone(old))
    assert torch.equal(found[1], alone(new))
    with model.coachhook.pinned(None):
        assert torch.equal(logits(model), alone(None))
    assert torch.equal(logits(model), alone(new))
    with pytest.raises(ValueError, match="'acme' is not among"), model.coachhook.pinned("acme"):
        pass
    if gate == "calibrated":
        model.coachhook.add_edits("acme", old)
        with model.coachhook.pinned("acme"):
            assert torch.equal(logits(model), alone(old))
