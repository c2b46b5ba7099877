"""The ten traps of METHOD.md section 3: what this package does where the published code goes wrong.

One class a trap. Each test first shows, where it can, that its case is one in which the published rule misbehaves.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_coachhook import published_hook, z_scores
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer, watched
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from coachhook_fast import EditConfig, Editor, EditRequest, load_edits
from coachhook_fast.architectures import layout_of
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.gate import SequenceContext
from coachhook_fast.hooks import Hooks
from coachhook_fast.layer import HookLinear

# Random models take edits badly, and say so; here it matters what the hooks do, not whether a fact was learnt.
pytestmark = pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")

GATES = ("calibrated", "sequence")
LAYERS = (1, 2)
TEXTS = [tiny_texts(20)[i] for i in (0, 3, 5, 8)]  # of different lengths

# ------------------------------------------------------------------ cases


def random_delta(m: int, d: int, *, rank: int = 3, scale: float = 0.1, seed: int = 0) -> LowRankDelta:
    """scale * (a random matrix of `rank`), fp64."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    X = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    return LowRankDelta.zeros(m, d, dtype=torch.float64).append(scale * R, X)


def hook_layer(gate: str, threshold: float, *, dtype: torch.dtype = torch.float64) -> HookLinear:
    """A hook around a random 13 -> 11 projection."""
    torch.manual_seed(0)
    hook = HookLinear(nn.Linear(13, 11, dtype=dtype), gate=gate)
    hook.set_delta(random_delta(11, 13), threshold)
    return hook


def key_of_norm(hook: HookLinear, norm: float) -> Tensor:
    """A key [d] with ||Δk|| = norm."""
    key = hook.get_delta_weight()[0].double()
    return key * (norm / (hook.get_delta_weight().double() @ key).norm())


def hooked_model(gate: str, *, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random edits in two layers, at which about a third of all tokens fire."""
    model = tiny_model(family, dtype=dtype)
    hooks = Hooks(model, layout_of(model), LAYERS, gate)
    tokenizer = tiny_tokenizer()
    for position, hook in enumerate(hooks.hooks):
        delta = random_delta(hook.out_features, hook.in_features, seed=position)
        hook.set_delta(delta, 0.5)
        if gate == "calibrated":
            with watched(model) as seen, torch.no_grad():
                for text in TEXTS:
                    model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
            norms = torch.cat([trace.norm.flatten() for trace in seen[position]])
            hook.set_delta(delta, float(norms.quantile(0.66)))
    return model


def logits_of(model: Any, text: str) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tiny_tokenizer()(text).input_ids]), use_cache=False).logits[0]


def editor_for(gate: str, *, dtype: torch.dtype = torch.float32, family: str = "llama", **changes: Any) -> Editor:
    """An editor of a tiny model with its statistics collected."""
    settings = {"layers": LAYERS, "v_num_grad_steps": 3, "mom2_update_weight": 10.0, "threshold_z": 1.0}
    config = EditConfig(gate=gate, **{**settings, **changes})
    editor = Editor(tiny_model(family, dtype=dtype), tiny_tokenizer(), config)
    editor.collect_statistics(tiny_texts(), progress=False)
    return editor


def requests(n: int, *, seed: int = 0) -> list[EditRequest]:
    return [EditRequest(**fact) for fact in tiny_facts(n, seed=seed)]


# ------------------------------------------------------------------ 1


class TestTrap01OneTokenInTheForwardPass:
    """Every KV-cached decode step: the std of one sample is NaN and an edit never fires after the prompt."""

    def test_calibrated_fires_on_a_single_token(self) -> None:
        hook = hook_layer("calibrated", 1.0)
        x = key_of_norm(hook, 1.5)[None]
        base, edited = hook.base_layer(x), hook.base_layer(x) + x @ hook.get_delta_weight().T
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
        torch.testing.assert_close(out, hook.base_layer(x[:, 4:]) + x[:, 4:] @ hook.get_delta_weight().T)

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
        logits = model(fresh, past_key_values=past, use_cache=cache).logits[0, -1]
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
            chunks = [model(part, past_key_values=past).logits for part in (ids[:, :cut], ids[:, cut:])]
        torch.testing.assert_close(torch.cat(chunks, 1)[0], logits_of(model, TEXTS[0]), rtol=1e-4, atol=1e-4)

    def test_sequence_is_the_published_rule_on_one_pass_and_its_state_does_not_depend_on_the_cut(
        self,
    ) -> None:
        hook = hook_layer("sequence", 0.7)
        hook.context = context = SequenceContext()
        torch.manual_seed(0)
        x = torch.randn(1, 17, 13, dtype=torch.float64)
        base = hook.base_layer(x[0])
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
        assert not torch.allclose(out, hook.base_layer(x))


# ------------------------------------------------------------------ 8


class TestTrap08MovingAndRounding:
    """The published hook casts its module inside forward, and GPT-J's hook weight is rounded between batches."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_forward_changes_no_parameter_and_no_state(self, dtype: torch.dtype) -> None:
        hook = hook_layer("calibrated", 0.5, dtype=dtype)
        weight, pointer = hook.base_layer.weight.detach().clone(), hook.base_layer.weight.data_ptr()
        served = hook.delta
        hook(torch.randn(3, 13, dtype=dtype))
        assert torch.equal(hook.base_layer.weight, weight)
        assert hook.base_layer.weight.data_ptr() == pointer
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
