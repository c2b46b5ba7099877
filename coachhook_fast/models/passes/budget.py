"""How many tokens the editor puts through the model at once: what the user set, or what a GPU is seen to hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from coachhook_fast.config import START_TOKENS

# Of what is free: a later pass of as many tokens may need more (longer rows, a larger share of predicted tokens).
_SHARE = 0.7


class TokenBudget:
    """Most tokens in a pass that is differentiated.

    Attributes:
        tokens: the budget now: `limit`, or START_TOKENS until passes on a GPU have been `measured`.
    """

    def __init__(self, limit: int | None, device: torch.device) -> None:
        self.tokens = limit or START_TOKENS
        self._device = device if limit is None and device.type == "cuda" else None
        self._bytes_a_token = 0.0
        self._most = float("inf")

    @contextmanager
    def measured(self, tokens: int) -> Iterator[None]:
        """Around a pass of `tokens` tokens: the budget follows from the most bytes a token that any has taken."""
        if self._device is None:
            yield
            return
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        peak = torch.cuda.max_memory_allocated(self._device) - before
        self._bytes_a_token = max(self._bytes_a_token, peak / tokens)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        if self._bytes_a_token > 0:
            self.tokens = max(1, int(min(self._most, _SHARE * free / self._bytes_a_token)))

    def too_many(self, tokens: int) -> None:
        """A pass of `tokens` did not fit: from now on at most half as many."""
        self._most = max(1, tokens // 2)
        self.tokens = min(self.tokens, int(self._most))
