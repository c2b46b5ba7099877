"""What a hook serves, as immutable values: one edit set's state, and which rows of a batch it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class HookState:
    """One published edit set of a layer: the serving copy of the delta and its threshold."""

    U: Tensor | None  # [m, r], None: B is Delta
    B: Tensor  # [r, d], in the gate's metric (LowRankDelta.served)
    sketch: Tensor | None  # [s, d]: decides most tokens of a large-rank `calibrated` gate
    threshold: Tensor  # [] fp32 or fp64: tau or alpha; a tensor, so that a new value recompiles nothing
    moments: tuple[float, float] | None  # mean and std over ordinary text of what tau is compared with
    relative: bool = False  # tau is compared with ||Delta k|| / ||k||

    @property
    def is_empty(self) -> bool:
        return self.B.shape[0] == 0


@dataclass(frozen=True)
class RowStates:
    """States of the rows of a batch, grouped by state, so that a forward pass only looks them up.

    Attributes:
        count: rows that were named; groups: each state with its rows ``[n]`` int64 on the state's device. Rows of the
            base model are in no group.
    """

    count: int
    groups: tuple[tuple[HookState, Tensor], ...]

    @classmethod
    def of(cls, states: Sequence[HookState | None]) -> RowStates:
        """One state, or None for the base model, a row."""
        found: dict[int, tuple[HookState, list[int]]] = {}
        for row, state in enumerate(states):
            if state is not None and not state.is_empty:
                found.setdefault(id(state), (state, []))[1].append(row)
        return cls(
            len(states),
            tuple((state, torch.tensor(rows, device=state.B.device)) for state, rows in found.values()),
        )

    def groups_in(self, x: Tensor) -> Iterator[tuple[HookState, Tensor]]:
        """Each state with its rows of ``x`` ``[S, T, d]``, where S is k times `count`: k copies of each row in turn.

        Raises:
            ValueError: S is no multiple of `count`, or ``x`` has no rows.
        """
        if x.dim() < 3 or x.shape[0] % self.count:
            raise ValueError(f"select() names {self.count} rows, the batch has activations of {tuple(x.shape)}")
        copies = x.shape[0] // self.count
        for state, rows in self.groups:
            rows = rows.to(x.device)
            if copies != 1:  # none in an empty batch
                rows = (rows[:, None] * copies + torch.arange(copies, device=x.device)).flatten()
            yield state, rows


@dataclass(frozen=True)
class ServedEdits:
    """What one hook does in a forward pass.

    Attributes:
        state: the published edit set's; mode: one of layer.MODES.
        rows: where rows of a batch differ (`Hooks.select`), the states of each.
        adapters: states by name that rows may be given, as multi-adapter serving of one base does.
    """

    state: HookState
    mode: str
    rows: RowStates | None = None
    adapters: Mapping[str, HookState] = field(default_factory=dict)
