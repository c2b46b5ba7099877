"""What the baselines share: a dense Δ added to a down-projection for every token, and the readings of a batch.

The baselines take target values, keys, statistics and contexts from the package, so that a table of methods compares
methods and nothing else. Base weights stay as they are; Δ is a buffer beside them, which is the same model as one with
Δ written into its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coachhook_fast.config import EditConfig
from coachhook_fast.editing.contexts import write_contexts
from coachhook_fast.editing.keys import KeyCollector, bare_outputs
from coachhook_fast.editing.targets.optimise import optimise
from coachhook_fast.model_defaults import default_layers
from coachhook_fast.models.architectures import down_projection_size, layout_of
from coachhook_fast.models.loading import context_length, fingerprint
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.request import EditRequest, TokenisedRequest, tokenise_batch
from coachhook_fast.statistics.cache import model_statistics
from coachhook_fast.statistics.key_statistics import KeyStatistics


class AddedDelta(nn.Module):
    """W0 x + b + Δ x for every token; Δ [m, d] fp32."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        out_features, in_features = down_projection_size(base_layer)
        self.delta: Tensor
        self.register_buffer("delta", torch.zeros(out_features, in_features, device=_device(base_layer)))
        self.active = True

    @property
    def base(self) -> nn.Module:
        """The wrapped layer, by the name that ours have; as `base_layer` the fingerprint sees through to it."""
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        return output + F.linear(x, self.delta.to(x.dtype)) if self.active else output


class Baseline(ABC):
    """A method that edits the same layers of the same model in the same batches.

    Args:
        config: the layers, optimisation settings and contexts of the run. `gate` must be "calibrated": it decides
            nothing here but how texts are fed.
        corpus: text for the key statistics, as `Editor.collect_statistics` takes it.
    """

    name: str
    gate = "none"
    whole_rows = False  # feed what stands after the last token that matters; only a sequence's statistics see it

    def __init__(self, model: Any, tokenizer: Any, config: EditConfig, corpus: Any) -> None:
        layout = layout_of(
            model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp
        )
        self.model, self.tokenizer = model, tokenizer
        self.partial = PartialModel(model, layout)
        self.layers = config.layers or default_layers(len(self.partial.blocks))
        self.config = config.replace(layers=tuple(self.layers))
        down = layout.down_projection(model, self.layers[0])
        with frozen(model):
            self.contexts = write_contexts(model, tokenizer, config)
            self.statistics: KeyStatistics = model_statistics(
                self.partial, tokenizer, self.config, fingerprint(model), down_projection_size(down)[1], corpus,
            )  # fmt: skip
        self.added = [self.wrap(layout.down_projection(model, layer)) for layer in self.layers]
        for layer, module in zip(self.layers, self.added, strict=True):
            self._place(layer, module)
        model.coachhook = self  # evaluation turns edits off through this name
        self.prepare()

    # ------------------------------------------------------------ what a method says

    def wrap(self, base_layer: nn.Module) -> Any:
        """The module that stands in for an edited layer's down-projection; has `delta` and `active`."""
        return AddedDelta(base_layer)

    def prepare(self) -> None:  # noqa: B027 (most keep nothing)
        """Sets up what the method keeps between batches."""

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Applies one batch."""

    def memory(self) -> dict[str, Tensor]:
        """What must be kept beside the deltas to go on."""
        return {}

    def recall(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """Takes `memory()` back."""

    # ------------------------------------------------------------ steps of a batch

    def tokenise(self, requests: Sequence[EditRequest]) -> list[TokenisedRequest]:
        return tokenise_batch(requests, self.tokenizer, self.contexts, context_length(self.model))

    def target_values(self, tokens: Sequence[TokenisedRequest]) -> Tensor:
        """V [m, n], found in the model as it stands."""
        options: dict[str, Any] = {"pad_id": self.pad_id}
        last = self.layers[-1]
        v0 = bare_outputs(self.partial, last, tokens, max_tokens=self.config.pass_tokens, **options)
        found = optimise(self.partial, last, tokens, v0, self.config, whole_rows=self.whole_rows, **options)
        return torch.stack([target.value for target in found], dim=1)

    def collector(self, tokens: Sequence[TokenisedRequest]) -> KeyCollector:
        return KeyCollector.of_requests(
            self.partial, self.layers, tokens,
            pad_id=self.pad_id, max_tokens=self.config.pass_tokens, whole_prompts=self.whole_rows,
        )  # fmt: skip

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    # ------------------------------------------------------------ save, switch off, undo

    def save(self, folder: Path) -> None:
        """Writes deltas and memory; a reader never sees half a file."""
        tensors = {f"delta.{index}": module.delta for index, module in enumerate(self.added)}
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "baseline.part"
        save_file({name: value.contiguous() for name, value in (tensors | self.memory()).items()}, part)
        part.replace(folder / "baseline.safetensors")

    def restore(self, folder: Path) -> None:
        tensors = load_file(folder / "baseline.safetensors")
        for index, module in enumerate(self.added):
            module.delta.copy_(tensors.pop(f"delta.{index}"))
        self.recall(tensors)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model within."""
        try:
            for module in self.added:
                module.active = False
            yield
        finally:
            for module in self.added:
                module.active = True

    def unload(self) -> None:
        for layer, module in zip(self.layers, self.added, strict=True):
            self._place(layer, module.base_layer)
        del self.model.coachhook

    def _place(self, layer: int, module: nn.Module) -> None:
        parent, _, name = self.partial.layout.rewrite_module_tmp.format(layer).rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class LayerByLayer(Baseline):
    """Target values first, then every layer takes its share of what is left, as MEMIT does."""

    def edit(self, requests: Sequence[EditRequest]) -> None:
        with frozen(self.model):
            tokens = self.tokenise(requests)
            values = self.target_values(tokens)
            collector = self.collector(tokens)
            for position in range(len(self.layers)):
                readings = collector.read(position, last=self.layers[-1])
                residual = (values - readings.outputs.to(values)) / (len(self.layers) - position)
                directions = self.directions(position, readings.keys.double())
                self.added[position].delta += (residual.double() @ directions.T).float()

    @abstractmethod
    def directions(self, position: int, keys: Tensor) -> Tensor:
        """X [d, n] of Δ += R Xᵀ for keys K [d, n] fp64; updates what the method keeps of K."""
