"""The two gates: threshold rules, and what the `sequence` gate knows of the tokens at hand.

`calibrated`: a token takes the edit where ||Δk|| >= τ. τ comes from the norms of Δ over a stored sample of ordinary
text's keys, so it needs no sequence, no state and no neighbouring tokens.

`sequence` (the paper's): z = (||Δk|| - mean) / std over the valid tokens of the token's own sequence, unbiased std; a
token takes the edit where z >= α. Its statistics live in a `SequenceContext`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

GATES = ("calibrated", "sequence")
THRESHOLD_RULES = ("zscore", "fpr")


@dataclass(frozen=True)
class Threshold:
    """A layer's threshold: τ (`calibrated`, in units of ||Δk||) or α (`sequence`, in standard deviations).

    `mean` and `std` describe ||Δk|| over ordinary text and serve to show a token's z under `calibrated`.
    """

    value: float
    mean: float = float("nan")
    std: float = float("nan")


class StateStore(Protocol):
    """Running statistics (count, mean, M2) of each sequence and layer; see integrations/transformers.py."""

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
        # torch.compile loses what is written to a thread-local object; within a graph there is one pass anyway.
        self._traced = SequenceContext()

    def here(self) -> SequenceContext:
        return self._traced if torch.compiler.is_compiling() else self._threads.context

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadContexts:
        return ThreadContexts()

    def __reduce__(self) -> Any:
        return ThreadContexts, ()


class _ThreadContext(threading.local):
    def __init__(self) -> None:
        self.context = SequenceContext()
