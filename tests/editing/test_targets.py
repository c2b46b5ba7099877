"""Target values of a batch against their one-at-a-time definition: whole model, whole sequence, one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_facts, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from coachhook_fast import EditConfig, EditRequest
from coachhook_fast.config import START_TOKENS
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.targets.adam import ProjectedAdam
from coachhook_fast.editing.targets.optimise import Target, optimise
from coachhook_fast.editing.targets.recorded import RecordedStep
from coachhook_fast.editing.targets.rows import TargetRows
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.budget import TokenBudget
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.request import TokenisedRequest

CONTEXTS = ["Therefore the rain", "Because of", "I"]


def one_at_a_time(
    model: Any, block: torch.nn.Module, tokens: TokenisedRequest, config: EditConfig
) -> tuple[torch.Tensor, int]:
    """v* as docs/method.md section 2 states it, and the number of Adam steps."""
    v0: list[torch.Tensor] = []

    def outputs(ids: tuple[int, ...], lookup: int, delta: torch.Tensor | None, keep: bool = False) -> torch.Tensor:
        def shift(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if keep:
                v0.append(hidden[0, lookup].detach())
            if delta is not None:
                hidden = hidden.clone()
                hidden[0, lookup] = hidden[0, lookup] + delta
            return (hidden,) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(shift)
        try:
            return model(torch.tensor([ids])).logits[0]
        finally:
            handle.remove()

    with torch.no_grad():
        outputs(tokens.bare.prompt, tokens.bare.lookup, None, keep=True)
        clean = outputs(tokens.kl.prompt, tokens.kl.lookup, None)[tokens.kl.lookup].log_softmax(-1)
        after = outputs(tokens.bare.prompt + tokens.bare.target, tokens.bare.lookup, None)[-1].log_softmax(-1)
    delta = torch.zeros_like(v0[0], requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.v_lr)
    for step in range(config.v_num_grad_steps):
        losses = []
        for row in tokens.rows:
            logits = outputs(row.prompt + row.target, row.lookup, delta)
            predicting = logits[len(row.prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(predicting, torch.tensor(row.target)))
        following = logits[-1].log_softmax(-1)  # the bare prompt is the last row
        shifted = outputs(tokens.kl.prompt, tokens.kl.lookup, delta)[tokens.kl.lookup].log_softmax(-1)
        kl = (clean.exp() * (clean - shifted)).sum()
        decay = config.v_weight_decay * delta.norm() / v0[0].norm() ** 2
        loss = torch.stack(losses).mean() + config.kl_factor * kl + decay
        loss = loss + config.continuation_factor * (after.exp() * (after - following)).sum()
        if loss < config.v_loss_threshold:
            return (v0[0] + delta).detach(), step
        adam.zero_grad()
        loss.backward()
        adam.step()
        bound = config.clamp_norm_factor * v0[0].norm()
        with torch.no_grad():
            if delta.norm() > bound:
                delta *= bound / delta.norm()
    return (v0[0] + delta).detach(), config.v_num_grad_steps


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma3"])
def test_a_batch_equals_one_at_a_time(family: str) -> None:
    model, tokenizer = tiny_model(family, dtype=torch.float64), tiny_tokenizer(bos=family == "llama")
    # Some requests must stop early and others not at all, in groups of their own.
    config = EditConfig(v_lr=0.5, v_num_grad_steps=8, v_loss_threshold=6.8, clamp_norm_factor=4.0, max_batch_tokens=400)
    partial = PartialModel(model, layout_of(model))
    batch = [EditRequest(**fact).tokenise(tokenizer, CONTEXTS) for fact in tiny_facts(4)]
    last = 2
    with frozen(model):
        v0 = bare_outputs(partial, last, batch, pad_id=0, max_tokens=400)
        found = optimise(partial, last, batch, v0, config, pad_id=0, whole_rows=False)
        wanted = [one_at_a_time(model, partial.blocks[last], tokens, config) for tokens in batch]
    steps = [steps for _, steps in wanted]
    assert [target.steps for target in found] == steps
    assert len(set(steps)) > 1, f"every request takes {steps[0]} steps: the test sees no stopping rule"
    tolerance = 1e-9 if family in ("gpt2", "llama") else 1e-4  # the others compute their softmax in fp32
    for target, (value, _) in zip(found, wanted, strict=True):
        assert float((target.value - value).norm() / value.norm()) < tolerance


def test_a_family_with_alibi_named_by_templates() -> None:
    """Its positions come from the tokens' mask, so no mask may be made once for it."""
    settings = {"hidden_size": 24, "n_layer": 4, "n_head": 4, "vocab_size": 320, "initializer_range": 0.3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **settings), dtype=torch.float32).eval()
    names = {"layer_module_tmp": "transformer.h.{}", "rewrite_module_tmp": "transformer.h.{}.mlp.dense_4h_to_h"}
    partial = PartialModel(model, layout_of(model, **names))
    batch = [request.tokenise(tiny_tokenizer(), CONTEXTS) for request in requests_of(4)]
    config = EditConfig(v_lr=0.1, v_num_grad_steps=5, v_loss_threshold=5.6, clamp_norm_factor=4.0)
    with frozen(model):
        v0 = bare_outputs(partial, 2, batch, pad_id=0, max_tokens=400)
        found = optimise(partial, 2, batch, v0, config, pad_id=0, whole_rows=False)
        for tokens, target in zip(batch, found, strict=True):
            value, steps = one_at_a_time(model, partial.blocks[2], tokens, config)
            assert target.steps == steps
            assert float((target.value - value).norm() / value.norm()) < 1e-4


@pytest.mark.parametrize("shrinks", [lambda share: False, lambda share: share > 0.4])
def test_requests_that_stay_in_the_batch_after_they_converged_change_nothing(
    shrinks: Callable[[float], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where steps are CUDA graphs, which are not recorded anew for every request that leaves."""
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer()
    partial = PartialModel(model, layout_of(model))
    pair = [EditRequest("{} works as a", "Ada Vale", "pilot"), EditRequest("{} was born in", "Ada Vale", "Oslo")]
    batch = [request.tokenise(tokenizer, CONTEXTS) for request in (*pair, *requests_of(5))]
    config = EditConfig(v_lr=0.5, v_num_grad_steps=8, v_loss_threshold=6.8, clamp_norm_factor=4.0)

    def found() -> list[Target]:
        with frozen(model):
            v0 = bare_outputs(partial, 2, batch, pad_id=0, max_tokens=400)
            return optimise(partial, 2, batch, v0, config, pad_id=0, whole_rows=False)

    wanted = found()
    assert len({target.steps for target in wanted}) > 2
    monkeypatch.setattr(RecordedStep, "worth_shrinking", lambda _, share, __: shrinks(share))
    for target, expected in zip(found(), wanted, strict=True):
        assert target.steps == expected.steps
        assert target.loss == pytest.approx(expected.loss, rel=1e-9)
        torch.testing.assert_close(target.value, expected.value, rtol=1e-9, atol=1e-9)


def test_rows_move_as_under_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    rates, bounds = torch.tensor([0.3, 0.5, 0.1]), torch.tensor([0.4, 50.0, 50.0])
    ours = ProjectedAdam(rates, bounds, 7)
    theirs = [torch.zeros(7, requires_grad=True) for _ in rates]
    adam = torch.optim.Adam([{"params": [p], "lr": float(rate)} for p, rate in zip(theirs, rates, strict=True)])
    for step in range(6):
        gradients = torch.randn(3, 7, generator=generator)
        ours.step(gradients, torch.tensor([True, True, step < 3]))
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        if step >= 3:
            theirs[2].grad = None
        adam.step()
        with torch.no_grad():
            theirs[0] *= (bounds[0] / theirs[0].norm()).clamp(max=1.0)
    torch.testing.assert_close(ours.rows, torch.stack(theirs))
    ours.select(torch.tensor([1]))
    gradient = torch.randn(1, 7, generator=generator)
    ours.step(gradient, torch.tensor([True]))
    theirs[0].grad, theirs[1].grad = None, gradient[0]
    adam.step()
    torch.testing.assert_close(ours.rows[0], theirs[1])


def solve(requests: list[EditRequest], **options: Any) -> list[Target]:
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer()
    partial = PartialModel(model, layout_of(model))
    batch = [request.tokenise(tokenizer, CONTEXTS) for request in requests]
    config = EditConfig(v_num_grad_steps=4, max_batch_tokens=options.pop("max_batch_tokens", 4000))
    with frozen(model):
        v0 = bare_outputs(partial, 2, batch, pad_id=0, max_tokens=400)
        return optimise(partial, 2, batch, v0, config, pad_id=0, whole_rows=False, **options)


def requests_of(n: int) -> list[EditRequest]:
    return [EditRequest(**fact) for fact in tiny_facts(n)]


def test_a_group_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = solve(requests_of(5))
    real, sizes = TargetRows.build.__func__, []  # type: ignore[attr-defined]

    def build(cls: Any, partial: Any, last: int, batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(cls, partial, last, batch, *rest)

    monkeypatch.setattr(TargetRows, "build", classmethod(build))
    for target, expected in zip(solve(requests_of(5)), wanted, strict=True):
        torch.testing.assert_close(target.value, expected.value, rtol=1e-9, atol=1e-9)
    assert sizes == [5, 3, 1, 1, 1, 1, 1]  # what did not fit is not tried again
    monkeypatch.setattr(TargetRows, "build", classmethod(_no_room))
    with pytest.raises(torch.OutOfMemoryError):
        solve(requests_of(2))


def test_groups_follow_the_memory_that_they_are_seen_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all, what is left after the first group is one; a budget that a user set stays."""
    wanted = solve(requests_of(6), max_batch_tokens=1)
    memory = Memory(monkeypatch, bytes_a_token=100, free=1_000_000)
    real, sizes = TargetRows.build.__func__, []  # type: ignore[attr-defined]

    def build(cls: Any, partial: Any, last: int, batch: Any, *rest: Any) -> Any:
        sizes.append(len(batch))
        memory.take(sum(len(tokens.rows) for tokens in batch))
        return real(cls, partial, last, batch, *rest)

    monkeypatch.setattr(TargetRows, "build", classmethod(build))
    budget = TokenBudget(None, torch.device("cuda"))
    budget.tokens = 1  # as if the start were small
    for target, expected in zip(solve(requests_of(6), budget=budget), wanted, strict=True):
        torch.testing.assert_close(target.value, expected.value, rtol=1e-9, atol=1e-9)
    assert sizes[0] == 1
    assert len(sizes) == 2
    sizes.clear()
    solve(requests_of(6), budget=TokenBudget(1, torch.device("cuda")))
    assert sizes == [1] * 6


class Memory:
    """A GPU's allocator as `TokenBudget` asks for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes_a_token: int, free: int) -> None:
        self.bytes_a_token, self.free, self.peak = bytes_a_token, free, 0
        answers = {
            "memory_allocated": lambda device: 0, "memory_reserved": lambda device: 0,
            "max_memory_allocated": lambda device: self.peak, "mem_get_info": lambda device: (self.free, 2 * self.free),
            "reset_peak_memory_stats": lambda device: self.take(0),
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def take(self, tokens: int) -> None:
        self.peak = tokens * self.bytes_a_token


def test_a_budget_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, bytes_a_token=100, free=1_000_000)
    budget = TokenBudget(None, torch.device("cuda"))
    assert budget.tokens == START_TOKENS

    def run(tokens: int, taken: int) -> int:
        with budget.measured(tokens):
            memory.take(taken)
        return budget.tokens

    assert run(50, 50) == 7_000  # .7 of what is free
    assert run(10, 20) == 3_500  # 200 bytes a token
    assert run(10, 1) == 3_500  # the most that any has taken counts
    memory.free = 4_000_000
    assert run(10, 1) == 14_000
    budget.too_many(9_000)
    assert budget.tokens == 4_500
    assert run(10, 1) == 4_500
    for limit, device in ((300, "cuda"), (None, "cpu")):
        fixed = TokenBudget(limit, torch.device(device))
        with fixed.measured(10):
            memory.take(1)
        assert fixed.tokens == (limit or START_TOKENS)
        fixed.too_many(100)
        assert fixed.tokens == 50


def _no_room(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def test_known_targets_are_not_sought_again() -> None:
    kept: list[dict[int, Target]] = []
    wanted = solve(requests_of(4), keep=kept.append, max_batch_tokens=1)
    assert [list(part) for part in kept] != [[0, 1, 2, 3]]
    assert sorted(index for part in kept for index in part) == [0, 1, 2, 3]
    known = {1: wanted[1], 3: Target(torch.full_like(wanted[3].value, 7.0), 0.1, 2)}
    kept.clear()
    found = solve(requests_of(4), known=known, keep=kept.append)
    assert sorted(index for part in kept for index in part) == [0, 2]
    assert torch.equal(found[3].value, known[3].value)
    torch.testing.assert_close(found[2].value, wanted[2].value, rtol=1e-9, atol=1e-9)


def test_requests_about_one_subject_share_their_change() -> None:
    pair = [EditRequest("{} works as a", "Ada Vale", "pilot"), EditRequest("{} was born in", "Ada Vale", "Oslo")]
    other = requests_of(1)
    one, two, alone = solve([pair[0], pair[1], *other])
    # The subject opens both prompts: same v0, so the same δ means the same value.
    torch.testing.assert_close(one.value, two.value, rtol=1e-12, atol=1e-12)
    assert one.steps == two.steps
    torch.testing.assert_close(alone.value, solve(other)[0].value, rtol=1e-9, atol=1e-9)


def test_a_model_without_numbers_is_reported() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        model.model.layers[4].self_attn.q_proj.weight[0, 0] = torch.nan
    partial = PartialModel(model, layout_of(model))
    batch = [EditRequest(**fact).tokenise(tokenizer, CONTEXTS) for fact in tiny_facts(2)]
    with frozen(model):
        v0 = bare_outputs(partial, 2, batch, pad_id=0, max_tokens=400)
        with pytest.raises(ValueError, match=r"requests\[\d\] has a loss of nan"):
            optimise(partial, 2, batch, v0, EditConfig(), pad_id=0, whole_rows=False)
