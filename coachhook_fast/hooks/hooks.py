"""Hooks: the hook layers installed in one model, and the switches an operator uses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.hooks.compiled import eagerly, eagerly_alone, tell_traced
from coachhook_fast.hooks.layer import HookLinear, check_mode
from coachhook_fast.hooks.states import HookState, RowStates, ServedEdits, Switch
from coachhook_fast.hooks.transformers_cache import SequenceTracker, wrap_method
from coachhook_fast.hooks.versions import Versions
from coachhook_fast.interrupts import deferred
from coachhook_fast.models.architectures import Layout, down_projection_size
from coachhook_fast.models.base_layer import given_back
from coachhook_fast.models.placement import check_loaded
from coachhook_fast.models.wrappers import unwrapped

ATTRIBUTE = "coachhook"
DEFAULT = "default"
_BATCHING = "init_continuous_batching"
_SAVING = "save_pretrained"


class Hooks:
    """The hook layers of one model, reachable as `model.coachhook`.

    Installing replaces each edited down-projection by a `HookLinear` around it; `unload` puts the originals back. Base
    weights are never written, so `disabled()` and `unload()` give the base model bit for bit.

    Edit sets may be published and switched on and off while other threads run the model: every forward pass of the
    model works with one whole version from its beginning to its end, compiled or not. Operators in several threads take
    turns, and none undoes what another asked.
    """

    def __init__(self, model: nn.Module, layout: Layout, layers: Sequence[int], gate: str) -> None:
        """Raises ValueError, with the model unchanged, if it has hooks already or a layer is out of range."""
        if hasattr(model, ATTRIBUTE):
            raise ValueError("model already has hooks: call model.coachhook.unload() first")
        check_loaded(model)
        if gate == "sequence" and layout.mixes_rows:
            raise ValueError(
                f"gate must be 'calibrated' for {type(model).__name__}, whose FFNs see all rows' tokens in one list, "
                f"got {gate!r}, which judges them row by row"
            )
        self.model = model
        self.layout = layout
        self.layers = checked_layers(model, layout, layers)
        originals = [layout.down_projection(model, layer) for layer in self.layers]
        self.hooks = [HookLinear(base, gate=gate, index=index) for index, base in enumerate(originals)]
        self._versions = Versions([hook.served for hook in self.hooks])
        for position, hook in enumerate(self.hooks):
            hook.join(self._versions, position)
        self._tracker = SequenceTracker(model, self.hooks) if gate == "sequence" else None
        self._handles = [
            model.register_forward_pre_hook(self._begin_pass),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            self._place(layer, hook)
        wrappers = {_SAVING: _warn_of_edits} | ({_BATCHING: _refuse_selections} if gate == "calibrated" else {})
        self._wrapped = [name for name, function in wrappers.items() if wrap_method(model, name, function)]
        setattr(model, ATTRIBUTE, self)

    def publish(self, edit_set: EditSet) -> None:
        """Makes `edit_set` the one that is served: passes that begin later see all of it, earlier ones nothing.

        Raises:
            ValueError: another gate, other layers or shapes than the hooks'; what was served before is served still.
        """
        with self._versions.turn():
            states = self._states(edit_set)
            self._versions.change(lambda position, entry: replace(entry, state=states[position], edit_set=edit_set))

    @property
    def edit_set(self) -> EditSet | None:
        """What `publish` made the one that is served; None before, and where a hook was given a delta of its own."""
        first, *others = (entry.edit_set for entry in self._versions.published())
        return first if all(other is first for other in others) else None

    def _states(self, edit_set: EditSet) -> list[HookState]:
        """What each hook would serve; ValueError where `edit_set` does not fit, TypeError where it is none."""
        if not isinstance(edit_set, EditSet):
            raise TypeError(f"edit_set must be an EditSet (store.load reads one), got {type(edit_set).__name__}")
        gate = self.hooks[0].gate
        if edit_set.config.gate != gate or edit_set.layers != self.layers:
            raise ValueError(
                f"the hooks are on layers {self.layers} with the {gate} gate, the edit set is for layers "
                f"{edit_set.layers} with {edit_set.config.gate}: only load_edits after unload() takes it"
            )
        module = edit_set.config.rewrite_module_tmp
        if module not in (None, self.layout.rewrite_module_tmp):
            raise ValueError(f"the hooks are on {self.layout.rewrite_module_tmp}, the edit set is for {module}")
        return [
            hook.serving_state(
                delta,
                threshold.value,
                moments=(threshold.mean, threshold.std),
                relative=bool(edit_set.config.threshold_relative),
            )
            for hook, delta, threshold in zip(self.hooks, edit_set.deltas, edit_set.thresholds, strict=True)
        ]

    # ---------------------------------------------------------------- several edit sets

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the edit sets that `select` may name, beside DEFAULT."""
        return tuple(self._versions.published()[0].adapters)

    def add_edits(self, name: str, edit_set: EditSet) -> None:
        """Holds `edit_set` ready as `name`, for the rows that `select` gives to it; replaces one of that name.

        Raises:
            ValueError: `name` is empty or DEFAULT; the `sequence` gate; other layers or shapes than the hooks'.
        """
        if not isinstance(name, str) or not name or name == DEFAULT:
            raise ValueError(f"name must be a name other than {DEFAULT!r}, got {name!r}")
        self.check_installed()
        self._check_calibrated()
        with self._versions.turn():
            states = self._states(edit_set)
            self._versions.change(
                lambda position, entry: replace(entry, adapters={**entry.adapters, name: states[position]})
            )

    def remove_edits(self, name: str) -> None:
        """Lets the edit set `name` go; blocks that have selected it go on with it. ValueError where there is none."""
        with self._versions.turn():
            _check_name(name, self.adapters)
            self._versions.change(
                lambda _, entry: replace(
                    entry, adapters={key: state for key, state in entry.adapters.items() if key != name}
                )
            )

    @contextmanager
    def select(self, rows: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of this thread's batches is served by the edit set called `rows[i]`.

        DEFAULT names the one that `publish` set, None the base model alone. The sets are those of the moment the block
        begins. A batch of k times as many rows holds k copies of each in turn, as beam search and
        `num_return_sequences` make them. Rows share one pass of the base; each edit set's gate sees its own rows.

        Raises:
            ValueError: an unknown name, no rows, the `sequence` gate, unloaded hooks, within another `select`; from
                `generate_batch`, which runs the model in its own thread; in a pass, another number of rows.
            RuntimeError: at the end of a block that another thread ends, as a generator resumed elsewhere would.
        """
        self.check_installed()
        self._check_calibrated()
        names = tuple(rows) if isinstance(rows, Iterable) and not isinstance(rows, str) else ()
        if not names or not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"rows must be a list with a name or None for each row, got {rows!r}")
        entries = self._versions.published()
        for name in {*names} - {None, DEFAULT}:
            _check_name(name, entries[0].adapters.keys())
        chosen = [
            RowStates.of([None if n is None else e.state if n == DEFAULT else e.adapters[n] for n in names])
            for e in entries
        ]
        with self._versions.viewed(
            lambda entries: tuple(replace(entry, rows=row) for entry, row in zip(entries, chosen, strict=True))
        ):
            yield

    @contextmanager
    def pinned(self, name: str | None = DEFAULT) -> Iterator[None]:
        """Within the block all rows of this thread's passes are served by the edit set `name` as it stands now.

        DEFAULT is the one that `publish` set, None the base model, bit for bit. A text that is written within keeps to
        one version, whatever is published meanwhile, at the cost of no gathering of rows.

        with model.coachhook.pinned():
            model.generate(**batch)

        Raises:
            ValueError: an unknown name; unloaded hooks; within another `pinned` or `select`.
            RuntimeError: at the end of a block that another thread ends.
        """
        self.check_installed()
        entries = self._versions.published()
        if name is None:
            entries = _asking(entries, "off")
        elif name != DEFAULT:
            _check_name(name, entries[0].adapters.keys())
            entries = tuple(replace(entry, state=entry.adapters[name]) for entry in entries)
        with self._versions.viewed(lambda _: entries):
            yield

    def _check_calibrated(self) -> None:
        if self.hooks[0].gate != "calibrated":
            raise ValueError("several edit sets need the calibrated gate: the sequence gate's state is of one edit set")

    def reserve(self, rank: int) -> None:
        """Pads what is served to `rank` with zero rows, now and in later versions.

        Compiled code then takes every edit set of up to that rank without recompiling; the rows cost what real ones do.

        Raises:
            TypeError: rank is no integer.
            ValueError: a negative rank, or one at which the factors would be larger than the base weight.
        """
        hook = self.hooks[0]
        m, d = hook.out_features, hook.in_features
        if type(rank) is not int:
            raise TypeError(f"rank must be an integer, got {rank!r}")
        if rank < 0 or rank * (m + d) >= m * d:
            raise ValueError(
                f"rank must be at least 0 and under {m * d // (m + d)} for layers of [{m}, {d}], got {rank}"
            )
        with self._versions.turn():
            for hook in self.hooks:
                hook.reserve = rank
            self._versions.change(lambda position, entry: self.hooks[position].remade(entry))
            if self.edit_set is not None:  # from the edit set itself: fewer rows than before are possible
                self.publish(self.edit_set)

    @property
    def modes(self) -> list[str]:
        """Mode of each hook as published."""
        return [entry.mode for entry in self._versions.published()]

    def set_modes(self, modes: Sequence[str]) -> None:
        """Mode of each hook: "off", "gated" or "always" (the temporary hook of an update). Within `disabled()`, of any
        thread, it takes effect when that ends. ValueError for another mode, or where there is not one a hook."""
        self._check_modes(modes)
        self._switch(lambda position, switch: replace(switch, asked=modes[position]))

    def force_modes(self, modes: Sequence[str] | None) -> None:
        """For an editor at work: these modes, whatever others have asked or ask meanwhile; None: what they ask."""
        if modes is not None:
            self._check_modes(modes)
        self._switch(lambda position, switch: replace(switch, forced=None if modes is None else modes[position]))

    def _check_modes(self, modes: Sequence[str]) -> None:
        if isinstance(modes, str) or not isinstance(modes, Sequence) or len(modes) != len(self.hooks):
            raise ValueError(f"modes must be a list of {len(self.hooks)}, one a hook, got {modes!r}")
        for mode in modes:
            check_mode(mode)

    def enable(self) -> None:
        """Edits take effect (the state after installing); within `disabled()`, of any thread, when that ends."""
        self.set_modes(["gated"] * len(self.hooks))

    def disable(self) -> None:
        """The base model, bit for bit, until `enable`."""
        self.set_modes(["off"] * len(self.hooks))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, bit for bit, within the `with` block; for all threads. Then what was asked last, by whoever
        and whenever, where no other such block is under way."""
        held = 0
        try:
            with deferred():
                self._hold_off(1)
                held = 1
            yield
        finally:
            with deferred():
                self._hold_off(-held)

    def _hold_off(self, blocks: int) -> None:
        self._switch(lambda _, switch: replace(switch, held_off=switch.held_off + blocks))

    def _switch(self, change: Callable[[int, Switch], Switch]) -> None:
        self._versions.change(lambda position, entry: replace(entry, switch=change(position, entry.switch)))

    def warm(self, run: Callable[[], Any]) -> None:
        """Calls `run` with the edits and without, in this thread alone: code that is compiled for both is there before
        another thread switches. Other threads notice nothing.

        Args:
            run: passes of the compiled model, as requests will make them: `lambda: model(ids)`.

        Raises:
            ValueError: within `select`.
        """
        for asked in ("gated", "off"):
            with self._versions.viewed(lambda entries, asked=asked: _asking(entries, asked)):  # type: ignore[misc]
                run()

    def unload(self) -> nn.Module:
        """Takes the hooks out and returns the untouched model; ValueError where they are out already."""
        self.check_installed()
        for layer, hook in zip(self.layers, self.hooks, strict=True):
            self._place(layer, given_back(hook))
        if self._tracker is not None:
            self._tracker.remove()
        for handle in self._handles:
            handle.remove()
        for name in self._wrapped:
            del self.model.__dict__[name]
        delattr(self.model, ATTRIBUTE)
        return self.model

    def check_installed(self) -> None:
        """ValueError unless these are the hooks that the model has now."""
        if hooks_of(self.model) is not self:
            raise ValueError("these hooks were unloaded: the model has others, or none")

    def check_editable(self) -> None:
        """ValueError unless the model has these hooks and this thread's passes see what is published."""
        self.check_installed()
        self._versions.check_not_viewed()

    def forget_pass(self) -> None:
        """For callers outside any forward pass of this thread: what a pass that Ctrl-C ended had pinned is let go."""
        self._versions.forget_pass()

    @eagerly_alone
    def _begin_pass(self, model: nn.Module, _: Any) -> None:
        if torch.compiler.is_dynamo_compiling():  # with a caller's function
            tell_traced(self._versions.traced)
        else:
            self._pin(model, get_eval_frame_callback() not in (None, False))

    @eagerly
    def _pin(self, model: nn.Module, compiled: bool) -> None:
        self._versions.pin(lambda thread: _passes_under_way(model, thread), compiled)

    @eagerly
    def _end_pass(self, *_: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._versions.unpin()

    def _place(self, layer: int, module: nn.Module) -> None:
        parent, name = self.layout.slot(self.model, layer)
        setattr(parent, name, module)


def _asking(entries: tuple[ServedEdits, ...], mode: str) -> tuple[ServedEdits, ...]:
    return tuple(replace(entry, switch=Switch(mode)) for entry in entries)


def _refuse_selections(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Continuous batching runs the model in another thread, which would not see this one's rows."""
    model.coachhook.check_editable()
    return type(model).init_continuous_batching(model, *args, **kwargs)


def _warn_of_edits(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own save_pretrained, which knows nothing of edits."""
    edit_set = model.coachhook.edit_set
    if edit_set is not None and edit_set.batches:
        warnings.warn(
            f"save_pretrained writes the base model alone, without its {edit_set.num_edits} edits, which no weight can "
            "hold: Editor.save_pretrained(folder) writes them, and load_edits(model, folder) reads them",
            stacklevel=2,
        )
    return type(model).save_pretrained(model, *args, **kwargs)


def _check_name(name: str | None, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"name {name!r} is not among the edit sets {list(known)}: add_edits() it first")


def _passes_under_way(model: nn.Module, thread: int) -> int:
    """How many calls of `model` are on the stack of a thread."""
    count, frame = 0, sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model:
            count += 1
        frame = frame.f_back
    return count


def checked_layers(model: nn.Module, layout: Layout, layers: Sequence[int]) -> tuple[int, ...]:
    """`layers` if each is a block of the model whose down-projection has the same shape; else ValueError."""
    count = len(layout.blocks(model))
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ValueError(f"layers {outside} are out of range: the model has blocks 0 to {count - 1}")
    shapes = {layer: down_projection_size(layout.down_projection(model, layer)) for layer in layers}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"layers must have down-projections of one shape, got {shapes}")
    return tuple(layers)


def hooks_of(model: nn.Module) -> Hooks | None:
    """The hooks installed in `model`, None where there are none."""
    found: Any = getattr(unwrapped(model), ATTRIBUTE, None)
    return found
