"""HookLinear: the drop-in FFN down-projection that carries the edits of one layer.

    out = base(x) + fire(x) * U (B x)          (docs/method.md sections 3 and 4)

The base layer is called or read, never written: its weight is the model's own storage. Everything the edits
add lives in one immutable `HookState`, published with those of the model's other hooks as one value
(`Versions`), so a forward pass sees either the old edit set or the new one, never a mixture.

Where a batch mixes edit sets (`Hooks.select`), `ServedEdits.rows` names the state of each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coachhook_fast.config import GATES
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.gate import carried_gate
from coachhook_fast.hooks.states import HookState, RowStates, ServedEdits
from coachhook_fast.hooks.versions import Versions
from coachhook_fast.models.base_layer import empty_hook, features, plain_weight, serving_placement, stand_in
from coachhook_fast.models.tensor_parallel import column_shard
from coachhook_fast.ops import gated_linear as ops
from coachhook_fast.ops.reference.gated_linear import accumulator_dtype, decide, sequence_rows
from coachhook_fast.ops.sketch import make_sketch

MODES = ("off", "gated", "always")


class SequenceInfo(Protocol):
    """What the `sequence` gate reads of a forward pass; `gate.SequenceContext` is one."""

    mask: Tensor | None  # [S, q] bool, True = a real token
    cu_seqlens: Tensor | None  # [S + 1] int32
    prompt_length: int | None  # how many of these tokens a new sequence's prompt holds, None = all

    states: Any  # where the running state of cached decoding is kept, None without a cache

    def load(self, index: int) -> Tensor | None: ...  # [S, 3]: count, mean, M2 before these tokens

    def store(self, index: int, states: Tensor) -> None: ...  # [S, q, 3]: after each of these tokens


class SequenceSource(Protocol):
    """Where a hook finds that; `gate.SequenceContext` (itself) and `gate.ThreadContexts` are two."""

    def here(self) -> SequenceInfo: ...


@dataclass(frozen=True)
class GateTrace:
    """What the gate sees and decides for each token: norm, z ``[...]`` fp32 or fp64, fire ``[...]`` bool.

    norm is ``||Delta k||``, or ``||Delta k|| / ||k||`` where tau is `relative` (of some rows, where edit sets differ).
    """

    norm: Tensor
    z: Tensor
    fire: Tensor
    relative: bool = False


class HookLinear(nn.Module):
    """A linear layer with gated edits.

    It stands in the place of its base and passes for it: an instance of the base's class as well, with the base's own
    parameters under the base's names, so that PEFT, accelerate and checkpoints find what they know.

    Attributes:
        base: the module it stands for, untouched. (It is not called `base_layer`: that marks PEFT's own layers.)
        in_features, out_features: ``d`` and ``m``.
        gate: "calibrated" (``||Delta k|| >= tau``) or "sequence" (the paper's z-score against the token's
            sequence).
        mode: "off" (the base alone), "gated", or "always" (the temporary hook: Delta for every token).
        index: position among the edited layers; names this layer's running state in `context`.
        miss_probability: chance that the two-stage gate overlooks a token that fires (large ranks,
            `calibrated`); None measures every token with all of ``B``. Takes effect at the next `set_delta`.
        reserve: rank up to which the serving copy is padded with zero rows, which change no norm: versions of up to
            this rank have one shape, so that a swap recompiles nothing. 0: no padding. Takes effect like the above.
        context: read by the `sequence` gate only; None means that every token is real and nothing came
            before.

    Where ranks share the base's columns out (tensor-parallel transformers), each hook holds its rank's columns of B,
    and inputs are its rank's columns of keys.
    """

    base: nn.Module
    weight: Tensor
    bias: Tensor | None

    def __new__(cls, base_layer: nn.Module, **_: Any) -> HookLinear:
        return empty_hook(cls, type(base_layer))  # type: ignore[no-any-return]

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        gate: str = "calibrated",
        index: int = 0,
        miss_probability: float | None = 1e-9,
    ) -> None:
        """Wrap `base_layer`: nn.Linear, transformers' Conv1D (weight ``[d, m]``), any module with sizes.

        Raises ValueError on an unknown gate, a negative index, a probability outside (0, 0.5) or a weight that ranks
        share out otherwise than by columns, TypeError where the sizes cannot be found.
        """
        nn.Module.__init__(self)  # the base's class has nothing to make: all it would is there
        if gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
        if index < 0:
            raise ValueError(f"index must not be negative, got {index}")
        if miss_probability is not None and not 0.0 < miss_probability < 0.5:
            raise ValueError(f"miss_probability must lie between 0 and 0.5, or be None, got {miss_probability}")
        in_features, out_features = features(base_layer)
        stand_in(self, base_layer, HookLinear)
        self.in_features, self.out_features = in_features, out_features
        self._shard = column_shard(base_layer)
        self.gate = gate
        self.index = index
        self.miss_probability = miss_probability
        self.reserve = 0
        self.context: SequenceSource | None = None
        dtype, device = serving_placement(base_layer, torch.float32)
        empty = LowRankDelta.zeros(self.out_features, self.in_features, dtype=dtype, device=device)
        self._versions = Versions([ServedEdits(self._make_state(empty, math.inf, None))])
        self._position = 0

    # ---------------------------------------------------------------- the edit set

    def join(self, versions: Versions[ServedEdits], position: int) -> None:
        """From now on serve entry `position` of `versions`, which the hooks of one model share."""
        self._versions, self._position = versions, position

    @property
    def served(self) -> ServedEdits:
        """What this hook does in the pass of this thread; without one, what is published."""
        return self._versions.current()[self._position]

    @property
    def mode(self) -> str:
        return self.served.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        check_mode(mode)
        self._versions.replace(
            self._position, lambda served: replace(served, switch=replace(served.switch, asked=mode))
        )

    def set_delta(
        self,
        delta: LowRankDelta,
        threshold: float,
        *,
        moments: tuple[float, float] | None = None,
        relative: bool = False,
    ) -> None:
        """Publish an edit set: a serving copy of `delta` in the base's dtype and device, and tau or alpha.

        moments: mean and std over ordinary text of what tau is compared with; only `trace` uses them.
        relative: tau is compared with ``||Delta k|| / ||k||``, not with ``||Delta k||`` (`calibrated` only).
        Raises ValueError, with the state as before, if the shapes differ from the layer's, the threshold is NaN or a
        relative one is asked of `sequence`.
        """
        with self._versions.turn():
            state = self.serving_state(delta, threshold, moments=moments, relative=relative)
            self._versions.replace(self._position, lambda served: replace(served, state=state, edit_set=None))

    def serving_state(
        self,
        delta: LowRankDelta,
        threshold: float,
        *,
        moments: tuple[float, float] | None = None,
        relative: bool = False,
    ) -> HookState:
        """What `set_delta` would publish."""
        if (delta.out_features, delta.in_features) != (self.out_features, self.in_features):
            raise ValueError(
                f"delta must be [{self.out_features}, {self.in_features}], "
                f"got [{delta.out_features}, {delta.in_features}]"
            )
        if math.isnan(threshold):
            raise ValueError(f"threshold must be a number, got {threshold}")
        if relative and self.gate != "calibrated":
            raise ValueError(f"relative must be False where the gate is {self.gate!r}, got {relative}")
        delta = delta.served()
        dtype, device = serving_placement(self.base, delta.dtype)
        if self._shard is not None:
            delta = LowRankDelta(delta.U, self._shard.own(delta.B).contiguous())
        return self._make_state(delta.to(dtype=dtype, device=device), threshold, moments, relative)

    @property
    def delta(self) -> LowRankDelta:
        """The serving copy: its U is not orthonormal where the gate has a metric."""
        state = self.served.state
        return LowRankDelta(state.U, state.B)

    @property
    def threshold(self) -> float:
        """tau (`calibrated`) or alpha (`sequence`); infinite before the first edit."""
        return float(self.served.state.threshold)

    def get_delta_weight(self) -> Tensor:
        """``Delta`` as served, ``[m, d]``; this rank's columns where ranks share the base out."""
        return self.delta.dense()

    # ---------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., m]``. NaN in a token leaves the other tokens alone and raises nothing."""
        served = self.served
        if served.rows is not None and served.mode == "gated":
            return self._forward_rows(x, served.rows)
        state = served.state
        if served.mode == "off" or state.is_empty:
            return self.base(x)
        if served.mode == "always":
            return self._always(x, state)
        context = self._sequence()
        if context is not None and _carries(context, x):
            with torch.no_grad():
                norm = self._parts.delta_norm(x.to(state.B.dtype), state.B)
                fire, _, states = self._decide(norm, state, context)
            context.store(self.index, states)
            return self._parts.correct(self.base(x), x, state.U, state.B, fire)
        sequence = self._arguments(context, x)
        edits = (state.U, state.B, state.threshold, state.sketch, self._rule(state), *sequence)
        weight = plain_weight(self.base)
        if weight is not None and weight.dtype == state.B.dtype:
            out, _, after = ops.gated_linear(x, weight, self.base.bias, *edits)  # type: ignore[arg-type]
        else:
            out, _, after = self._parts.gated_delta(self.base(x), x, *edits)
        if context is not None and context.states is not None:
            context.store(self.index, after[:, None])
        return out

    def _forward_rows(self, x: Tensor, rows: RowStates) -> Tensor:
        """The base once for all of ``x`` ``[S, T, d]``; then each edit set corrects its own rows."""
        out = self.base(x)
        for state, own in rows.groups_in(x):
            edits = (state.U, state.B, state.threshold, state.sketch, self._rule(state), None, None, None)
            corrected, _, _ = self._parts.gated_delta(out[own], x[own], *edits)
            out = out.index_copy(0, own, corrected)
        return out

    @property
    def _parts(self) -> Any:
        """delta_norm, key_length, correct and gated_delta, on whole keys or on this rank's columns."""
        return self._shard or ops

    def _rule(self, state: HookState) -> str:
        """The operators' name of the gate."""
        return "relative" if state.relative else self.gate

    def _always(self, x: Tensor, state: HookState) -> Tensor:
        """Delta for every token: the temporary hook."""
        out = self.base(x)
        k = x.to(state.B.dtype)
        c = nn.functional.linear(k, state.B) if self._shard is None else self._shard.coordinates(k, state.B)
        return out + (c if state.U is None else nn.functional.linear(c, state.U.to(c.dtype))).to(out.dtype)

    @torch.no_grad()
    def trace(self, x: Tensor) -> GateTrace:
        """What `forward` in mode "gated" would decide for ``x`` ``[..., d]``; changes no state.

        z is the paper's under `sequence`; under `calibrated` it is (norm - mean) / std with the moments given
        to `set_delta`, NaN without them.
        """
        served = self.served
        if served.rows is not None:
            return self._trace_rows(x, served.rows)
        state = served.state
        if self.gate == "calibrated":
            return self._trace_calibrated(x, state)
        norm = self._parts.delta_norm(x.to(state.B.dtype), state.B)
        context = self._sequence()
        if context is not None and _carries(context, x):
            fire, z, _ = self._decide(norm, state, context)
            return GateTrace(norm, z, fire)
        mask, cu_seqlens, running = self._arguments(context, x)
        if cu_seqlens is not None:
            grid = norm.reshape(-1)
        else:
            grid = norm.reshape(sequence_rows(norm.shape, mask, running), -1)
        mask = None if mask is None else mask.reshape(grid.shape)
        fire, z, _ = ops.sequence_gate(grid, state.threshold, mask, cu_seqlens, running)
        return GateTrace(norm, z.reshape(norm.shape), fire.reshape(norm.shape))

    def _trace_calibrated(self, x: Tensor, state: HookState) -> GateTrace:
        norm = self._parts.delta_norm(x.to(state.B.dtype), state.B)
        length = self._parts.key_length(x) if state.relative else None
        fire, _ = decide(norm, state.threshold, self._rule(state), length=length)
        fire = fire & (not state.is_empty)
        if length is not None:
            norm = norm / length.clamp(min=torch.finfo(norm.dtype).tiny)
        mean, std = state.moments or (math.nan, math.nan)
        return GateTrace(norm, (norm - mean) / std, fire, state.relative)

    def _trace_rows(self, x: Tensor, rows: RowStates) -> GateTrace:
        """Each row by its own edit set; norm 0 and z NaN in rows of the base model."""
        norm = torch.zeros(x.shape[:-1], dtype=accumulator_dtype(x.dtype), device=x.device)
        z, fire = torch.full_like(norm, math.nan), torch.zeros_like(norm, dtype=torch.bool)
        relative = False
        for state, own in rows.groups_in(x):
            found = self._trace_calibrated(x[own], state)
            norm[own], z[own], fire[own] = found.norm.to(norm), found.z.to(z), found.fire
            relative |= found.relative
        return GateTrace(norm, z, fire, relative)

    def _sequence(self) -> SequenceInfo | None:
        """What the gate must know of this thread's pass; None where it needs nothing."""
        return None if self.gate != "sequence" or self.context is None else self.context.here()

    def _arguments(self, context: SequenceInfo | None, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The operators' mask, cu_seqlens and running state for ``x``."""
        if context is None:
            return None, None, None
        mask = context.mask
        if mask is not None and mask.numel() != x.shape[:-1].numel():
            raise ValueError(f"context.mask {tuple(mask.shape)} does not cover the tokens of x {tuple(x.shape)}")
        return mask, context.cu_seqlens, context.load(self.index)

    def _decide(self, norm: Tensor, state: HookState, context: SequenceInfo) -> tuple[Tensor, Tensor, Tensor]:
        """fire, z ``[..., q]`` and states ``[S, q, 3]`` for norms ``[..., q]``."""
        grid = norm.reshape(-1, norm.shape[-1])
        mask = None if context.mask is None else context.mask.reshape(grid.shape)
        running = context.load(self.index)
        fire, z, states = carried_gate(grid, state.threshold, mask, running, context.prompt_length)
        return fire.reshape(norm.shape), z.reshape(norm.shape), states

    # ---------------------------------------------------------------- module housekeeping

    # Inference tensors could not be saved for a later backward pass, and would recompile a compiled forward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _make_state(
        self, delta: LowRankDelta, threshold: float, moments: tuple[float, float] | None, relative: bool = False
    ) -> HookState:
        B = delta.B.clone() if delta.B.is_inference() else delta.B.detach()
        U = delta.U
        if U is not None:
            U = U.clone() if U.is_inference() else U.detach()
            if U.shape[1] < self.reserve:
                B = nn.functional.pad(B, (0, 0, 0, self.reserve - B.shape[0]))
                U = nn.functional.pad(U, (0, self.reserve - U.shape[1]))
        sketch = None
        sketched = self.gate == "calibrated" and self._shard is None
        if sketched and self.miss_probability is not None and B.device.type != "meta":
            sketch = make_sketch(B, self.miss_probability)
        tau = torch.tensor(threshold, dtype=accumulator_dtype(B.dtype), device=B.device)
        return HookState(U, B, sketch, tau, moments, relative)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HookLinear:
        """`.to()`, `.half()`, `.cuda()`: the serving copy follows the base, the threshold stays precise."""
        super()._apply(fn, recurse)
        self._versions.replace(self._position, lambda served: self.remade(served, fn))
        return self

    def remade(self, served: ServedEdits, fn: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> ServedEdits:
        """`served` with the factors of its states as `fn` returns them, padded to `reserve`."""

        def change(state: HookState) -> HookState:
            U = None if state.U is None else fn(state.U)
            factors = LowRankDelta(U, fn(state.B))
            return self._make_state(factors, float(state.threshold), state.moments, state.relative)

        adapters = {name: change(state) for name, state in served.adapters.items()}
        return replace(served, state=change(served.state), adapters=adapters)

    def train(self, mode: bool = True) -> HookLinear:
        super().train(mode)
        self.base.train(mode)  # it is no child
        return self

    def __reduce__(self) -> Any:
        return empty_hook, (HookLinear, type(self.base)), self.__dict__

    def extra_repr(self) -> str:
        return f"gate={self.gate!r}, mode={self.mode!r}, delta={self.delta!r}"


def _carries(context: SequenceInfo, x: Tensor) -> bool:
    """Whether a state must be kept after each of several tokens; a single token is the operator's own case."""
    return context.states is not None and x.shape[-2] > 1


def check_mode(mode: str) -> None:
    """ValueError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
