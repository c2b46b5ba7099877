"""The two gates, and what the `sequence` gate knows of the tokens at hand.

`calibrated`: a token takes the edit where ||Δk|| >= τ, or ||Δk|| / ||k|| >= τ where τ is relative; the norm may be one
that ordinary text's spread gives (whitening.py). τ comes from that measure over a stored sample of ordinary text's
keys, so it needs no sequence, no state and no neighbouring tokens.

`sequence` (the paper's): z = (||Δk|| - mean) / std over the valid tokens of the token's own sequence, unbiased std; a
token takes the edit where z >= α. Its statistics live in a `SequenceContext`.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import Tensor


def carried_gate(
    norm: Tensor,  # [S, q]
    alpha: Tensor,  # []
    mask: Tensor | None,  # [S, q] bool, True = a real token
    before: Tensor | None,  # [S, 3]: count, mean, M2 before these tokens
    prompt_length: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fire [S, q], z [S, q], states [S, q, 3]
    """`sequence` in cached decoding.

    A sequence's first tokens, its prompt, are judged together; every later token against all tokens up to itself. So an
    answer does not depend on how many tokens a later pass brings: one, a turn of a conversation, or a draft to verify.

    Args:
        prompt_length: how many of the tokens belong to the prompt where nothing came before; None: all.

    Returns:
        Decisions, z, and the running state after each token, to which a cache may be cut back.
    """
    states = _running_states(norm, mask, before)
    end = norm.shape[1] if prompt_length is None else prompt_length
    in_prompt = torch.arange(norm.shape[1], device=norm.device)[None] < end
    if before is not None:
        in_prompt = in_prompt & (before[:, :1] == 0)
    against = torch.where(in_prompt[..., None], states[:, end - 1 : end], states)
    count, mean, m2 = against.unbind(-1)
    z = (norm.to(torch.float64) - mean) / torch.sqrt(m2 / (count - 1.0))  # count 1: 0/0, NaN
    if mask is not None:
        z = torch.where(mask, z, torch.nan)
    fire = (z >= alpha) & (count >= 2.0)
    return fire, z.to(norm.dtype), states.to(norm.dtype)


def _running_states(norm: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """(count, mean, M2) after each token, [S, q, 3] fp64: sums about the mean, so nothing cancels."""
    valid = torch.ones_like(norm, dtype=torch.bool) if mask is None else mask
    values = torch.where(valid, norm.to(torch.float64), 0.0)  # whatever sits in the padding stays out
    count = valid.to(torch.float64).cumsum(1)
    centre = values.sum(1, keepdim=True) / count[:, -1:].clamp(min=1.0)
    deviation = torch.where(valid, values - centre, 0.0)
    total = deviation.cumsum(1)
    mean = centre + total / count.clamp(min=1.0)
    m2 = ((deviation * deviation).cumsum(1) - total * total / count.clamp(min=1.0)).clamp(min=0.0)
    if before is not None:  # Chan's formula
        count0, mean0, m20 = before.to(torch.float64)[:, None].unbind(-1)
        both = count0 + count
        share = count / both.clamp(min=1.0)
        shift = mean - mean0
        mean, m2, count = mean0 + shift * share, m20 + m2 + shift * shift * count0 * share, both
    return torch.stack([count, mean, m2], dim=-1)


class StateStore(Protocol):
    """Running statistics (count, mean, M2) of each sequence and layer; see transformers_cache.py."""

    def load(self, index: int) -> Tensor | None: ...

    def store(self, index: int, states: Tensor) -> None: ...


class SequenceContext:
    """What the `sequence` gate must know of a forward pass; shared by the hooks of one model.

    Attributes:
        mask: [B, q] bool, True for real tokens among those of this forward pass; None where all are real.
        cu_seqlens: [S + 1] int32, boundaries of packed sequences; None where each row is one sequence.
        states: where the running state of cached decoding is kept; None without a cache.
        prompt_length: how many of the tokens are the prompt of a new sequence, the rest being a draft; None: all.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.mask: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.states: StateStore | None = None
        self.prompt_length: int | None = None

    def here(self) -> SequenceContext:
        return self

    def load(self, index: int) -> Tensor | None:
        """[B, 3] (count, mean, M2) before the tokens of this pass in edited layer `index`; None at the start."""
        return None if self.states is None else self.states.load(index)

    def store(self, index: int, states: Tensor) -> None:
        """Keeps the [B, q, 3] states after each token of this pass."""
        if self.states is not None:
            self.states.store(index, states)


class ThreadContexts:
    """A `SequenceContext` for each thread, so that several may run one model at once."""

    def __init__(self) -> None:
        self._threads = _ThreadContext()

    def here(self) -> SequenceContext:
        return self._threads.context

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadContexts:
        return ThreadContexts()

    def __reduce__(self) -> Any:
        return ThreadContexts, ()


class _ThreadContext(threading.local):
    def __init__(self) -> None:
        self.context = SequenceContext()
