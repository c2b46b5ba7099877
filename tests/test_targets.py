"""Target values of a batch against their one-at-a-time definition: whole model, whole sequence, one request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_facts, tiny_model, tiny_tokenizer

from coachhook_fast import EditConfig, EditRequest
from coachhook_fast.architectures import layout_of
from coachhook_fast.forward import PartialModel, frozen
from coachhook_fast.keys import bare_outputs
from coachhook_fast.request import TokenisedRequest
from coachhook_fast.targets import optimise

CONTEXTS = ["Therefore the rain", "Because of", "I"]


def one_at_a_time(
    model: Any, block: torch.nn.Module, tokens: TokenisedRequest, config: EditConfig
) -> tuple[torch.Tensor, int]:
    """v* as METHOD.md section 2 states it, and the number of Adam steps."""
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
    delta = torch.zeros_like(v0[0], requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.v_lr)
    for step in range(config.v_num_grad_steps):
        losses = []
        for row in tokens.rows:
            logits = outputs(row.prompt + row.target, row.lookup, delta)[len(row.prompt) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target)))
        shifted = outputs(tokens.kl.prompt, tokens.kl.lookup, delta)[tokens.kl.lookup].log_softmax(-1)
        kl = (clean.exp() * (clean - shifted)).sum()
        decay = config.v_weight_decay * delta.norm() / v0[0].norm() ** 2
        loss = torch.stack(losses).mean() + config.kl_factor * kl + decay
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
    config = EditConfig(v_num_grad_steps=8, v_loss_threshold=6.8, clamp_norm_factor=4.0, max_batch_tokens=400)
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
