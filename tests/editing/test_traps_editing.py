"""Traps 5, 6 and 8 to 10 of docs/method.md section 3: what editing does where the published code goes wrong.

One class a trap; the others are in test_traps.py.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from plain_coachhook import z_scores
from tiny import tiny_model, tiny_tokenizer, watched
from torch import nn
from trap_cases import (
    GATES,
    TEXTS,
    editor_for,
    hook_layer,
    hooked_model,
    logits_of,
    random_delta,
    requests,
)

from coachhook_fast import EditRequest, load_edits
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.layer import HookLinear

# Random models take edits badly, and say so; here it matters what the hooks do, not whether a fact was learnt.
pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")

# ------------------------------------------------------------------ 5


class TestTrap05WhereAlphaIsRecorded:
    """The published α comes from padded prompt-only batches in an un-gated model: not what inference sees."""

    def test_every_edit_fires_in_every_layer_on_prompt_and_on_prompt_with_answer(self) -> None:
        editor = editor_for("sequence", dtype=torch.float64, alpha=50.0)  # α is then what the batch set
        batch = requests(4)
        editor.edit(batch, progress=False)
        peaks: list[list[float]] = [[], []]
        for request in batch:
            for text in (request.text, f"{request.text} {request.target_new}"):
                with watched(editor.model) as seen:
                    logits_of(editor.model, text)
                for position, traces in enumerate(seen):
                    peaks[position].append(traces[0].z.max().item())
        for hook, found in zip(editor.hooks, peaks, strict=True):
            assert hook.threshold <= min(found)
            assert hook.threshold == pytest.approx(min(found), rel=1e-9)

    def test_a_batch_of_unequal_lengths_gives_the_alpha_of_its_requests_one_by_one(self) -> None:
        """Padding in the recording pass would move α."""
        editor = editor_for("sequence", dtype=torch.float64, alpha=50.0, layers=(2,))
        batch = requests(4)
        assert len({len(editor.tokenizer(request.text).input_ids) for request in batch}) > 2
        editor.edit(batch, progress=False)
        hook = editor.hooks[0]
        found = []
        for request in batch:
            ids = editor.tokenizer(request.text).input_ids
            with watched(editor.model) as seen:
                logits_of(editor.model, request.text)
            assert seen[0][0].z.shape == (1, len(ids))
            found.append(float(z_scores(seen[0][0].norm[0]).max()))
        assert hook.threshold <= min(found) * (1 + 1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_the_request_that_set_alpha_fires_in_a_padded_batch_too(self, family: str, dtype: torch.dtype) -> None:
        """α is some token's own z: without a margin, rounding decides whether that token reaches it again."""
        for seed in (1, 2, 3):
            editor = editor_for("sequence", family=family, dtype=dtype, alpha=50.0)
            batch = requests(4, seed=seed)
            editor.edit(batch, progress=False)
            for side in ("left", "right"):
                texts = [f"{request.text} {request.target_new}" for request in batch]
                inputs = tiny_tokenizer(padding_side=side)(texts, padding=True, return_tensors="pt")
                mask = inputs["attention_mask"]
                with torch.no_grad(), watched(editor.model) as seen:
                    editor.model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
                for traces in seen:
                    assert traces[0].fire.any(dim=-1).all()

    def test_a_text_without_z_leaves_alpha_alone(self) -> None:
        """A one-token prompt has no z; a batch whose facts hold already changes nothing, so nothing has one."""
        editor = editor_for("sequence", v_loss_threshold=1e9)
        editor.edit(requests(2), progress=False)
        assert all(0 < hook.threshold < 2.2 + 1e-6 for hook in editor.hooks)
        editor = editor_for("sequence", alpha=50.0)
        assert len(editor.tokenizer("A").input_ids) == 1
        editor.edit([EditRequest("{}", "A", "b"), *requests(1)], progress=False)
        assert all(0 < hook.threshold < 50 for hook in editor.hooks)

    def test_alpha_never_rises(self) -> None:
        editor = editor_for("sequence")
        before = [2.2, 2.2]
        for start in (0, 2, 4):
            editor.edit(requests(6)[start : start + 2], progress=False)
            after = [hook.threshold for hook in editor.hooks]
            assert all(new <= old + 1e-6 for new, old in zip(after, before, strict=True))
            before = after


# ------------------------------------------------------------------ 6


class TestTrap06RoundedDifference:
    """O and P rounded separately: with Δ at 0.5 % of W, bf16 gave 18 % error in M."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("gate", GATES)
    def test_the_norm_comes_from_the_delta(self, gate: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        d, m = 256, 64
        base = nn.Linear(d, m, dtype=dtype)
        W = base.weight.detach().double()
        delta = random_delta(m, d)
        delta = LowRankDelta(delta.U, delta.B * (0.005 * W.norm() / delta.B.norm()))
        hook = HookLinear(base, gate=gate)
        hook.set_delta(delta, 1.0)
        x = torch.randn(1, 200, d).to(dtype)
        exact = (x[0].double() @ delta.dense().T).norm(dim=-1)
        error = ((hook.trace(x).norm[0].double() - exact) / exact).abs().mean()
        O = nn.functional.linear(x[0], (W + delta.dense()).to(dtype), base.bias)
        published = (((O - base(x[0])).double().norm(dim=-1) - exact) / exact).abs().mean()
        assert error < 1e-3
        assert published > 20 * error


# ------------------------------------------------------------------ 8


class TestTrap08MovingAndRounding:
    """The published hook casts its module inside forward, and GPT-J's hook weight is rounded between batches."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_forward_changes_no_parameter_and_no_state(self, dtype: torch.dtype) -> None:
        hook = hook_layer("calibrated", 0.5, dtype=dtype)
        weight, pointer = hook.base.weight.detach().clone(), hook.base.weight.data_ptr()
        served = hook.delta
        hook(torch.randn(3, 13, dtype=dtype))
        assert torch.equal(hook.base.weight, weight)
        assert hook.base.weight.data_ptr() == pointer
        assert hook.delta.B.data_ptr() == served.B.data_ptr()
        assert hook.delta.dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_edits_of_a_half_precision_model_do_not_decay(self, dtype: torch.dtype) -> None:
        """Δ after several batches is the sum of its batches to fp32, not rounded to 16 bits in between."""
        editor = editor_for("calibrated", dtype=dtype)
        for start in (0, 2, 4):
            editor.edit(requests(6)[start : start + 2], progress=False)
        for position, delta in enumerate(editor.edit_set.deltas):
            updates = [batch.layers[position] for batch in editor.ledger]
            total = sum(update.residuals.double() @ update.directions.double().T for update in updates)
            error = (delta.dense().double() - total).norm() / total.norm()
            assert error < 1e-5
            assert (total.to(dtype).double() - total).norm() / total.norm() > 10 * error
        assert all(hook.delta.dtype == dtype for hook in editor.hooks)

    @pytest.mark.parametrize("gate", GATES)
    def test_the_base_is_untouched_bit_for_bit(self, gate: str) -> None:
        editor = editor_for(gate)
        untouched = tiny_model("llama")
        editor.edit(requests(2), progress=False)
        assert not torch.equal(logits_of(editor.model, requests(1)[0].text), logits_of(untouched, requests(1)[0].text))
        with editor.disabled():
            assert torch.equal(logits_of(editor.model, TEXTS[0]), logits_of(untouched, TEXTS[0]))
        model = editor.unload()
        assert not any(isinstance(module, HookLinear) for module in model.modules())
        before, after = untouched.state_dict(), model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ 9


class TestTrap09NothingToSave:
    """The published hooks are closures: nothing to save, load, swap or undo."""

    @pytest.mark.parametrize("gate", GATES)
    def test_saved_and_loaded_edits_give_the_same_bits(self, gate: str, tmp_path: Path) -> None:
        editor = editor_for(gate)
        editor.edit(requests(3), progress=False)
        editor.save_pretrained(tmp_path / "edits")
        loaded = load_edits(tiny_model("llama"), tmp_path / "edits")
        for text in [*TEXTS, *(request.text for request in requests(3))]:
            assert torch.equal(logits_of(loaded, text), logits_of(editor.model, text))
        assert not torch.equal(
            logits_of(loaded, requests(3)[0].text), logits_of(tiny_model("llama"), requests(3)[0].text)
        )

    @pytest.mark.parametrize("gate", GATES)
    def test_rollback_undoes_the_last_batch(self, gate: str) -> None:
        editor = editor_for(gate, dtype=torch.float64)
        texts = [*TEXTS, *(request.text for request in requests(4))]
        editor.edit(requests(4)[:2], progress=False)
        before = [logits_of(editor.model, text) for text in texts]
        thresholds = [hook.threshold for hook in editor.hooks]
        second = editor.edit(requests(4)[2:], progress=False)
        assert not torch.allclose(logits_of(editor.model, texts[-1]), before[-1])
        editor.rollback(second.id)
        assert [hook.threshold for hook in editor.hooks] == pytest.approx(thresholds, rel=1e-9)
        for text, expected in zip(texts, before, strict=True):
            torch.testing.assert_close(logits_of(editor.model, text), expected, rtol=1e-8, atol=1e-8)

    def test_hooks_are_modules_that_can_be_copied(self) -> None:
        model = hooked_model("calibrated")
        twin = copy.deepcopy(model)
        assert torch.equal(logits_of(model, TEXTS[0]), logits_of(twin, TEXTS[0]))


# ------------------------------------------------------------------ 10


class TestTrap10AliasedResults:
    """The published intermediate results alias one dict: those of a mid-run batch are of the final weights."""

    def test_a_later_batch_changes_nothing_reported_before(self) -> None:
        editor = editor_for("sequence")
        report = editor.edit(requests(4)[:2], progress=False)
        state, ledger = editor.edit_set, tuple(editor.ledger)
        kept = copy.deepcopy(report)
        deltas = [delta.dense().clone() for delta in state.deltas]
        keys = [update.keys.clone() for update in ledger[0].layers]
        editor.edit(requests(4)[2:], progress=False)
        assert repr(report) == repr(kept)
        assert len(ledger) == 1 and len(editor.ledger) == 2  # noqa: PT018
        assert editor.edit_set is not state
        assert all(torch.equal(d.dense(), old) for d, old in zip(state.deltas, deltas, strict=True))
        assert all(torch.equal(u.keys, old) for u, old in zip(ledger[0].layers, keys, strict=True))
        assert any(
            not torch.allclose(new.dense(), old) for new, old in zip(editor.edit_set.deltas, deltas, strict=True)
        )
