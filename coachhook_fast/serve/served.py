"""The model as clients' threads run it: base, default and adapters by name, each text by one version of its edits."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.hooks.hooks import DEFAULT, Hooks
from coachhook_fast.hooks.load_edits import load_edits
from coachhook_fast.models.architectures import Layout
from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.metrics import Metrics

BASE = "base"
_WATCHED = 1 / 16  # of passes: telling what the gate did costs the norms a second time


class Served:
    """One model with hooks, whose published edit set others replace meanwhile.

    Args:
        model: without hooks; they are installed here. layout, layers, gate: as `Hooks` takes them.
        adapters: folders of further edit sets by name.
        metrics: gets a sample of the gate's decisions.

    Raises:
        ValueError: an adapter has a name that is taken, or does not fit (see `load_edits`).
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        layers: Sequence[int],
        gate: str,
        *,
        adapters: Mapping[str, Path] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.model = model
        self.hooks = Hooks(model, layout, layers, gate)
        self.version = BASE
        self._lock = threading.Lock()  # a version and its name go together
        for name, folder in (adapters or {}).items():
            if name in (BASE, DEFAULT):
                raise ValueError(f"--adapter {name}={folder}: the names {BASE!r} and {DEFAULT!r} are taken")
            load_edits(model, folder, name=name)
        if metrics is not None:
            for layer, hook in zip(self.hooks.layers, self.hooks.hooks, strict=True):
                hook.register_forward_pre_hook(_counting(layer, metrics))

    @property
    def names(self) -> tuple[str, ...]:
        """What `pinned` takes."""
        return BASE, DEFAULT, *self.hooks.adapters

    def publish(self, edit_set: EditSet) -> None:
        """Texts that begin later are of `edit_set`."""
        with self._lock:
            self.hooks.publish(edit_set)
            self.version = edit_set.batches[-1].id if edit_set.batches else BASE

    def check_name(self, name: str) -> None:
        """ApiError 404 where there is no edit set of that name."""
        if name not in self.names:
            raise ApiError(
                404, f"no model {name!r}: there are {list(self.names)}", param="model", code="model_not_found"
            )

    @contextmanager
    def pinned(self, name: str) -> Iterator[str]:
        """Within the block this thread's passes are served by `name` as it is now; gives its version."""
        with self._lock:
            block = self.hooks.pinned(None if name == BASE else name)
            block.__enter__()
            version = self.version if name == DEFAULT else name
        try:
            yield version
        finally:
            block.__exit__(None, None, None)


def _counting(layer: int, metrics: Metrics) -> Callable[..., None]:
    def count(hook: Any, args: tuple[torch.Tensor, ...]) -> None:
        if random.random() < _WATCHED and hook.served.mode != "off":
            fire = hook.trace(args[0]).fire
            metrics.add("coachhook_gate_tokens_total", fire.numel(), layer=str(layer))
            metrics.add("coachhook_gate_fired_total", int(fire.sum()), layer=str(layer))

    return count
