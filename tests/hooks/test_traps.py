"""Traps 1 to 4 and 7 of docs/method.md section 3: what the gate does where the published code goes wrong.

One class a trap. Each test first shows, where it can, that its case is one in which the published rule misbehaves.
Traps 5, 6 and 8 to 10 are in test_traps_editing.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plain_coachhook import published_hook, z_scores
from tiny import CACHE, tiny_tokenizer, watched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from trap_cases import (
    GATES,
    TEXTS,
    editor_for,
    hook_layer,
    hooked_model,
    key_of_norm,
    logits_of,
)

from coachhook_fast import EditRequest
from coachhook_fast.hooks.gate import SequenceContext

# Random models take edits badly, and say so; here it matters what the hooks do, not whether a fact was learnt.
pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")

# ------------------------------------------------------------------ 1


class TestTrap01OneTokenInTheForwardPass:
    """Every KV-cached decode step: the std of one sample is NaN and an edit never fires after the prompt."""

    def test_calibrated_fires_on_a_single_token(self) -> None:
        hook = hook_layer("calibrated", 1.0)
        x = key_of_norm(hook, 1.5)[None]
        base, edited = hook.base(x), hook.base(x) + x @ hook.get_delta_weight().T
        assert not published_hook(base, edited, -1e9)[3].any()  # the published code, at any threshold
        torch.testing.assert_close(hook(x), edited)
        assert not torch.allclose(base, edited)

    def test_sequence_judges_a_generated_token_against_all_before_it(self) -> None:
        hook = hook_layer("sequence", 1.5)
        hook.context = context = SequenceContext()
        context.states = States()
        x = torch.stack([key_of_norm(hook, norm) for norm in (0.3, 0.1, 0.2, 0.15, 4.0)])[None]
        hook(x[:, :4])
        trace = hook.trace(x[:, 4:])
        assert trace.z.item() == pytest.approx(z_scores(hook.trace(x).norm[0])[4].item(), rel=1e-10)
        out = hook(x[:, 4:])
        torch.testing.assert_close(out, hook.base(x[:, 4:]) + x[:, 4:] @ hook.get_delta_weight().T)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
    def test_calibrated_generation_with_the_cache_is_generation_without_it(self, family: str) -> None:
        model = hooked_model("calibrated", family=family)
        ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
        with watched(model) as seen:
            cached = generate(model, ids, steps=12, cache=True)
        decode_fires = sum(int(trace.fire.sum()) for traces in seen for trace in traces[1:])
        assert all(trace.fire.numel() == 1 for traces in seen for trace in traces[1:])
        assert decode_fires > 0
        plain = generate(model, ids, steps=12, cache=False)
        assert cached[0] == plain[0]
        torch.testing.assert_close(cached[1], plain[1], rtol=1e-4, atol=1e-4)
        base = copy.deepcopy(model)
        base.coachhook.disable()
        assert not torch.allclose(generate(base, ids, steps=12, cache=True)[1], cached[1], atol=1e-2)

    def test_sequence_decoding_carries_the_running_state(self) -> None:
        """Every pass's z is over all tokens so far: by the plain rule, from the norms as they were seen."""
        model = hooked_model("sequence", dtype=torch.float64)
        ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
        with watched(model) as seen:
            generate(model, ids, steps=12, cache=True)
        for traces in seen:
            assert any(bool(trace.fire.any()) for trace in traces[1:])
            norms = torch.cat([trace.norm[0] for trace in traces])
            end = 0
            for trace in traces:
                end += trace.norm.shape[1]
                expected = z_scores(norms[:end])[end - trace.norm.shape[1] :]
                torch.testing.assert_close(trace.z[0], expected, rtol=1e-9, atol=1e-9)

    def test_sequence_generate_uses_the_running_state(self) -> None:
        """The same through model.generate, whose cache carries the state."""
        model = hooked_model("sequence", dtype=torch.float64)
        ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
        tokens, _ = generate(model, ids, steps=12, cache=True)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert made[0, ids.shape[1] :].tolist() == tokens[: made.shape[1] - ids.shape[1]]


class States:
    """The running state of each layer, as a decoding loop would keep it: that after the last token."""

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}

    def load(self, index: int) -> Tensor | None:
        return self.rows.get(index)

    def store(self, index: int, states: Tensor) -> None:
        self.rows[index] = states[:, -1]


@torch.no_grad()
def generate(model: Any, ids: Tensor, *, steps: int, cache: bool) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits they were chosen from, [steps, vocabulary]."""
    past = DynamicCache(config=model.config) if cache else None
    tokens: list[int] = []
    rows = []
    fresh = ids
    for _ in range(steps):
        logits = model(fresh, **{CACHE: past}, use_cache=cache).logits[0, -1]
        rows.append(logits)
        tokens.append(int(logits.argmax()))
        fresh = torch.tensor([[tokens[-1]]])
        ids = torch.cat([ids, fresh], dim=1)
        fresh = fresh if cache else ids
    return tokens, torch.stack(rows)


# ------------------------------------------------------------------ 2


class TestTrap02Padding:
    """Padding enters mean and std: eight pads moved a true z of 2.47 to 3.75 or 1.77."""

    @pytest.mark.parametrize(("pad_norm", "published"), [(0.0, 3.75), (0.6243, 1.77)])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_numbers_of_the_paper(self, pad_norm: float, published: float, side: str) -> None:
        hook = hook_layer("sequence", 2.2)
        hook.context = context = SequenceContext()
        real = torch.stack([key_of_norm(hook, norm) for norm in (0, 0, 1, 0, 0, 0, 0, 0)])
        pads = torch.stack([key_of_norm(hook, pad_norm)] * 8)
        x = torch.cat([pads, real] if side == "left" else [real, pads])[None]
        spike = 10 if side == "left" else 2
        wrong = hook.trace(x)
        assert wrong.z[0, spike].item() == pytest.approx(published, abs=0.005)
        context.mask = torch.ones(1, 16, dtype=torch.bool)
        context.mask[0, slice(0, 8) if side == "left" else slice(8, 16)] = False
        right = hook.trace(x)
        assert right.z[0, spike].item() == pytest.approx(2.47, abs=0.005)
        assert right.fire.nonzero().tolist() == [[0, spike]]

    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_padded_batch_is_its_rows(self, gate: str, side: str, family: str) -> None:
        model = hooked_model(gate, family=family)
        batch = tiny_tokenizer(padding_side=side)(TEXTS, padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        assert int((mask == 0).sum()) > 8
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), watched(model) as seen:
            together = model(**batch, position_ids=positions, use_cache=False).logits
        assert all(0 < int(traces[0].fire.sum()) < int(mask.sum()) for traces in seen)
        for row, text in enumerate(TEXTS):
            torch.testing.assert_close(together[row][mask[row].bool()], logits_of(model, text), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("gate", GATES)
    def test_nan_in_the_padding_reaches_nothing(self, gate: str) -> None:
        hook = hook_layer(gate, 0.5)
        hook.context = context = SequenceContext()
        torch.manual_seed(1)
        x = torch.randn(1, 9, 13, dtype=torch.float64)
        context.mask = torch.tensor([[True] * 6 + [False] * 3])
        clean = hook(x)[:, :6]
        x[:, 6:] = torch.nan
        assert torch.equal(hook(x)[:, :6], clean)


# ------------------------------------------------------------------ 3


class TestTrap03ShortPrompts:
    """The largest z among n tokens is (n-1)/sqrt(n): at α = 2.2 no prompt under seven tokens can fire."""

    def test_calibrated_fires_at_any_length_and_for_two_subjects(self) -> None:
        hook = hook_layer("calibrated", 1.0)
        for norms in ([2.0], [0, 2.0], [0.0, 0, 2.0, 0, 0, 0], [0, 2.0, 0, 0, 0, 0, 2.0, 0, 0, 0]):
            x = torch.stack([key_of_norm(hook, norm) for norm in norms])
            if len(norms) > 1:
                assert z_scores(hook.trace(x[None]).norm[0]).max() < 2.2  # the published code does nothing
            assert hook.trace(x[None]).fire[0].tolist() == [norm > 1 for norm in norms]

    def test_sequence_lowers_alpha_until_a_short_prompt_fires(self) -> None:
        editor = editor_for("sequence")
        ids = editor.tokenizer("Bo is").input_ids
        assert (len(ids) - 1) / len(ids) ** 0.5 < 2.2
        editor.edit([EditRequest("{} is", "Bo", "red")], progress=False)
        with watched(editor.model) as seen:
            logits_of(editor.model, "Bo is")
        assert all(traces[0].fire.any() for traces in seen)
        assert all(0 < hook.threshold < 2.2 for hook in editor.hooks)


# ------------------------------------------------------------------ 4


class TestTrap04LaterTokens:
    """A token's z depends on the tokens after it, so chunked prefill and prefix caching change the answer."""

    def test_calibrated_decides_each_token_alone(self) -> None:
        hook = hook_layer("calibrated", 1.0)
        torch.manual_seed(0)
        x = torch.randn(1, 17, 13, dtype=torch.float64)
        whole = hook(x)
        assert 0 < int(hook.trace(x).fire.sum()) < 17
        for cut in (1, 5, 16):
            torch.testing.assert_close(torch.cat([hook(x[:, :cut]), hook(x[:, cut:])], 1), whole)
        order = torch.randperm(17)
        torch.testing.assert_close(hook(x[:, order]), whole[:, order])

    @pytest.mark.parametrize("cut", [1, 7, 20])
    def test_calibrated_chunked_prefill_is_one_prefill(self, cut: int) -> None:
        model = hooked_model("calibrated")
        ids = torch.tensor([tiny_tokenizer()(TEXTS[0]).input_ids])
        past = DynamicCache(config=model.config)
        with torch.no_grad():
            chunks = [model(part, **{CACHE: past}).logits for part in (ids[:, :cut], ids[:, cut:])]
        torch.testing.assert_close(torch.cat(chunks, 1)[0], logits_of(model, TEXTS[0]), rtol=1e-4, atol=1e-4)

    def test_sequence_is_the_published_rule_on_one_pass_and_its_state_does_not_depend_on_the_cut(
        self,
    ) -> None:
        hook = hook_layer("sequence", 0.7)
        hook.context = context = SequenceContext()
        torch.manual_seed(0)
        x = torch.randn(1, 17, 13, dtype=torch.float64)
        base = hook.base(x[0])
        expected, norms, z, fire = published_hook(base, base + x[0] @ hook.get_delta_weight().T, 0.7)
        torch.testing.assert_close(hook(x)[0], expected)
        assert 0 < int(fire.sum()) < 17
        states = []
        for cuts in ([17], [5, 17], [1, 2, 16, 17]):
            context.states = States()
            start = 0
            for end in cuts:
                trace = hook.trace(x[:, start:end])
                hook(x[:, start:end])
                start = end
            states.append(context.states.rows[0])
            assert trace.z[0, -1].item() == pytest.approx(z[-1].item(), rel=1e-9)  # the last token has seen all
        count, mean, m2 = states[0][0]
        assert count == 17
        torch.testing.assert_close(torch.stack([mean, (m2 / 16).sqrt()]), torch.stack([norms.mean(), norms.std()]))
        for state in states[1:]:
            torch.testing.assert_close(state, states[0], rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ 7


class SyncWatch(TorchDispatchMode):
    """Names of the ops that make the host wait for the device, or give an output whose shape depends on data."""

    SYNCING = (
        "nonzero",
        "_local_scalar_dense",
        "masked_select",
        "unique",
        "item",
        "equal.default",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in self.SYNCING):
            self.found.append(name)
        if name.startswith(("aten.index.", "aten.index_put")):
            indices = args[1]
            if any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
                self.found.append(f"{name} with a boolean index")
        return func(*args, **(kwargs or {}))


class TestTrap07HostSync:
    """outputs[idx_bool] = new[idx_bool] forces a host sync and rules out CUDA graphs."""

    def test_the_watch_sees_the_published_code(self) -> None:
        with SyncWatch() as watch:
            published_hook(torch.zeros(5, 3), torch.randn(5, 3), 0.0)
        assert any("boolean" in name or "nonzero" in name for name in watch.found)

    @pytest.mark.parametrize("gate", GATES)
    @pytest.mark.parametrize("masked", [False, True])
    def test_forward_never_waits_for_the_device(self, gate: str, masked: bool) -> None:
        hook = hook_layer(gate, 0.5, dtype=torch.float32)
        hook.context = context = SequenceContext()
        x = torch.randn(2, 9, 13)
        if masked:
            context.mask = torch.ones(2, 9, dtype=torch.bool)
        with torch.no_grad(), SyncWatch() as watch:
            out = hook(x)
        assert watch.found == []
        assert not torch.allclose(out, hook.base(x))
