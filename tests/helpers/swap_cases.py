"""What the tests of hot swap and of adapters share: random edit sets, their models, and threads that run them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor

from coachhook_fast import EditConfig, EditSet
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.models.architectures import layout_of

LAYERS = (0, 1, 2, 3)
IDS = torch.tensor([tiny_tokenizer()(tiny_texts()[0]).input_ids])


def edit_set(seed: int, rank: int, gate: str = "calibrated") -> EditSet:
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for _ in LAYERS:
        R, X = torch.randn(24, rank, generator=generator), torch.randn(45, rank, generator=generator)
        deltas.append(LowRankDelta.zeros(24, 45).append(0.3 * R, X))
    config = EditConfig(layers=LAYERS, gate=gate, mom2_update_weight=1.0)
    return EditSet("", config, (), tuple(deltas), (Threshold(0.5),) * len(LAYERS))


def model_with(gate: str = "calibrated") -> Any:
    model = tiny_model("llama")
    Hooks(model, layout_of(model), LAYERS, gate)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


def alone(edits: EditSet | None) -> Tensor:
    """The logits of one version, in a model that nobody else runs."""
    model = model_with("calibrated" if edits is None else edits.config.gate)
    if edits is None:
        model.coachhook.disable()
    else:
        model.coachhook.publish(edits)
    return logits(model)


class Load:
    """Threads that run passes until told to stop, and check each against the versions that there are."""

    def __init__(self, run: Callable[[], Tensor], versions: list[Tensor], threads: int = 3) -> None:
        self.run, self.versions = run, versions
        self.passes = [0] * 8
        self.problems: list[Any] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                found = self.run()
            except BaseException as error:
                self.problems.append(error)
                return
            distances = [float((found - version).abs().max()) for version in self.versions]
            nearest = min(range(len(distances)), key=distances.__getitem__)
            if distances[nearest] > 1e-4:
                self.problems.append(distances)
                return
            self.passes[nearest] += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
