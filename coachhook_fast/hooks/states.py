"""What a hook serves, as immutable values: one edit set's state, and which rows of a batch it is for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.edits.edit_set import EditSet


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

    @property
    def kind(self) -> Hashable:
        """See `ServedEdits.kind`."""
        tensors = (self.U, self.B, self.sketch)
        return self.relative, *(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)


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
class Switch:
    """Who has switched what: each has a place of its own, so that nobody's block undoes what somebody else asked.

    Attributes:
        asked: the mode that `enable`, `disable` or `set_modes` asked for last.
        held_off: `disabled()` blocks under way, of all threads: while there are any, edits are off.
        forced: the mode that an editor at work needs, whatever the others say; None outside its work.
    """

    asked: str = "gated"
    held_off: int = 0
    forced: str | None = None

    @property
    def mode(self) -> str:
        return self.forced or ("off" if self.held_off else self.asked)

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        """A copy does what this one does now: it is in nobody's block."""
        return Switch(self.mode)

    def __reduce__(self) -> Any:
        return Switch, (self.mode,)


@dataclass(frozen=True)
class ServedEdits:
    """What one hook does in a forward pass.

    Attributes:
        state: the published edit set's; edit_set: that edit set, None where only a delta was set.
        switch: what decides `mode`, one of layer.MODES.
        rows: where rows of a batch differ (`Hooks.select`), the states of each.
        adapters: states by name that rows may be given, as multi-adapter serving of one base does.
    """

    state: HookState
    switch: Switch = Switch()
    rows: RowStates | None = None
    adapters: Mapping[str, HookState] = field(default_factory=dict)
    edit_set: EditSet | None = None
    mode: str = field(init=False)  # a value, not a property: compiled code asks for it at every layer

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", self.switch.mode)

    @property
    def kind(self) -> Hashable:
        """What code compiled for this one depends on: another kind may be compiled anew."""
        rows = self.rows and (self.rows.count, tuple((state.kind, len(own)) for state, own in self.rows.groups))
        return self.mode, self.state.kind, rows
