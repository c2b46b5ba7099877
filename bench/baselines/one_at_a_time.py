"""Target values, keys and update as MEMIT's and CoachHooK's published code computes them, written plainly.

One request at a time: its contexts and its KL prompt as one padded batch through the whole model, logits at every
position, every step. Then for every layer keys and values from whole forward passes, and a dense solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.config import EditConfig
from coachhook_fast.request import TokenisedRequest


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded model inputs."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def target_value(
    model: Any, block: nn.Module, tokens: TokenisedRequest, config: EditConfig, pad_id: int
) -> tuple[Tensor, int]:
    """v* [m] of one request and the number of Adam steps."""
    rows = [*tokens.rows, tokens.kl]
    inputs = _padded([row.prompt + row.target for row in rows], pad_id, model.device)
    lookups = torch.tensor([row.lookup for row in rows], device=model.device)
    numbers = torch.arange(len(rows), device=model.device)
    answers = [torch.tensor(row.target, device=model.device)[:, None] for row in tokens.rows]
    v0: list[Tensor] = []
    delta: Tensor | None = None

    def shift(_: nn.Module, __: Any, output: Any) -> Any:
        nonlocal delta
        hidden = output[0] if isinstance(output, tuple) else output
        if delta is None:
            bare = hidden[len(tokens.rows) - 1, tokens.bare.lookup].detach().clone()
            v0.append(bare.to(torch.promote_types(bare.dtype, torch.float32)))  # δ is fp32 in the published code too
            delta = torch.zeros_like(v0[0], requires_grad=True)
        hidden = hidden.clone()
        hidden[numbers, lookups] += delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(shift)
    adam: torch.optim.Adam | None = None
    clean: Tensor | None = None
    try:
        for step in range(config.v_num_grad_steps):
            logits = model(**inputs, use_cache=False).logits
            assert delta is not None
            adam = adam or torch.optim.Adam([delta], lr=config.v_lr)
            log_p = logits.log_softmax(-1, dtype=delta.dtype)
            losses = []
            for index, row in enumerate(tokens.rows):
                first = len(row.prompt) - 1
                predicted = log_p[index, first : first + len(row.target)]
                losses.append(-predicted.gather(1, answers[index]).mean())
            kl_log_p = log_p[-1, tokens.kl.lookup]
            clean = kl_log_p.detach() if clean is None else clean
            kl = (clean.exp() * (clean - kl_log_p)).sum()
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
        assert delta is not None
        return (v0[0] + delta).detach(), config.v_num_grad_steps
    finally:
        handle.remove()


def edit(
    model: Any,
    blocks: Sequence[nn.Module],
    downs: Sequence[nn.Module],
    layers: Sequence[int],
    matrices: Sequence[Tensor],
    batch: Sequence[TokenisedRequest],
    config: EditConfig,
    pad_id: int,
) -> list[Tensor]:
    """Δ [m, d] of every layer for one batch; the weights are put back. `matrices` are the layers' C, fp64."""
    values = torch.stack(
        [target_value(model, blocks[layers[-1]], tokens, config, pad_id)[0] for tokens in batch], dim=1
    )
    before = [down.weight.detach().clone() for down in downs]
    deltas = []
    try:
        for position, down in enumerate(downs):
            keys = _inputs(model, down, batch, pad_id)
            outputs = _bare_outputs(model, blocks[layers[-1]], batch, pad_id)
            residual = (values - outputs) / (len(layers) - position)
            K = keys.double()
            X = torch.linalg.solve(matrices[position] + K @ K.T, K)
            deltas.append((residual.double() @ X.T).float())
            with torch.no_grad():
                down.weight += deltas[-1]
        return deltas
    finally:
        with torch.no_grad():
            for down, weight in zip(downs, before, strict=True):
                down.weight.copy_(weight)


@torch.no_grad()
def _inputs(model: Any, down: nn.Module, batch: Sequence[TokenisedRequest], pad_id: int) -> Tensor:
    """K [d, n]: half the bare prompt, half the mean of the contexts; one request at a time."""
    columns = []
    for tokens in batch:
        kept: list[Tensor] = []
        handle = down.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        model(**_padded([row.prompt for row in tokens.rows], pad_id, model.device), use_cache=False)
        handle.remove()
        found = torch.stack([kept[0][index, row.lookup] for index, row in enumerate(tokens.rows)])
        columns.append(0.5 * found[-1] + 0.5 * found[:-1].mean(0))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def _bare_outputs(model: Any, block: nn.Module, batch: Sequence[TokenisedRequest], pad_id: int) -> Tensor:
    """[m, n], the block's outputs at the lookup positions of the bare prompts."""
    columns = []
    for tokens in batch:
        kept: list[Any] = []
        handle = block.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        model(**_padded([tokens.bare.prompt], pad_id, model.device), use_cache=False)
        handle.remove()
        hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        columns.append(hidden[0, tokens.bare.lookup])
    return torch.stack(columns, dim=1)
