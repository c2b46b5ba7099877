"""Key statistics: E[k kᵀ] of every edited layer, and a sample of keys, in one pass over a corpus.

One truncated forward pass serves all layers: sequences are packed without padding, the pass ends after the last edited
block, products are accumulated in the model's precision over one batch (fp32 at least) and in fp64 over the corpus.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook_fast.corpus import pack_rows
from coachhook_fast.distributed import ranks
from coachhook_fast.forward import PartialModel, frozen
from coachhook_fast.progress import track

_TILES = 8  # column tiles of the lower triangle: 9/16 of the full product's work


@dataclass(frozen=True)
class KeyStatistics:
    """Second moments and sample keys of the edited layers.

    Attributes:
        moments: layer -> E[k kᵀ], [d, d], fp32 (fp64 for fp64 models).
        samples: layer -> [S, d] keys of ordinary tokens, uniformly drawn, the same tokens in every layer.
        tokens: number of keys in the moments.
        model: fingerprint of the base model.
    """

    moments: dict[int, Tensor]
    samples: dict[int, Tensor]
    tokens: int
    model: str

    def check(self, layers: Sequence[int], key_dim: int, model: str) -> None:
        """ValueError unless these are the statistics of `layers` of the model with fingerprint `model`."""
        if self.model != model:
            raise ValueError(f"statistics are of another model: fingerprint {self.model}, this model's is {model}")
        missing = [layer for layer in layers if layer not in self.moments]
        if missing:
            raise ValueError(f"statistics lack layers {missing}, they hold {sorted(self.moments)}")
        for layer in layers:
            if tuple(self.moments[layer].shape) != (key_dim, key_dim):
                shape = tuple(self.moments[layer].shape)
                raise ValueError(f"statistics of layer {layer} are {shape}, expected {(key_dim, key_dim)}")

    def save(self, path: Path) -> None:
        tensors = {f"moment.{layer}": moment.contiguous() for layer, moment in self.moments.items()}
        tensors |= {f"sample.{layer}": sample.contiguous() for layer, sample in self.samples.items()}
        _save_atomically(tensors, {"tokens": str(self.tokens), "model": self.model}, path)

    @classmethod
    def load(cls, path: Path) -> KeyStatistics:
        """Reads a saved file; ValueError where it is none."""
        tensors, metadata = _load(path)
        if "tokens" not in metadata:
            raise ValueError(f"{path} holds no key statistics (metadata {metadata})")
        return cls(
            moments={int(name[7:]): value for name, value in tensors.items() if name.startswith("moment.")},
            samples={int(name[7:]): value for name, value in tensors.items() if name.startswith("sample.")},
            tokens=int(metadata["tokens"]),
            model=metadata["model"],
        )


class KeyAccumulator:
    """Running sums of k kᵀ (fp64, lower triangle) and a uniform sample of keys, for several layers at once."""

    def __init__(self, layers: Sequence[int], sample_size: int, seed: int = 0) -> None:
        self.layers = tuple(layers)
        self.sample_size = sample_size
        self.seed = seed
        self.sums: dict[int, Tensor] = {}
        self.samples: dict[int, Tensor] = {}
        self.priorities = torch.empty(0, dtype=torch.float64)
        self.tokens = 0

    def add(self, keys: dict[int, Tensor], batch: int) -> None:
        """Adds the keys [N, d] of one batch; `batch` numbers it, so that its share of the sample is its own."""
        count = next(iter(keys.values())).shape[0]
        draws = torch.rand(
            count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + batch), dtype=torch.float64
        )
        self._sample(draws, keys)
        for layer in self.layers:
            self._add_products(layer, keys[layer])
        self.tokens += count

    def _sample(self, draws: Tensor, keys: dict[int, Tensor]) -> None:
        """Keeps the keys with the largest draws seen so far: a uniform sample whatever the order of batches."""
        merged = torch.cat([self.priorities, draws])
        kept = merged.topk(min(self.sample_size, merged.numel())).indices.sort().values
        old = self.priorities.numel()
        from_old, from_new = kept[kept < old], kept[kept >= old] - old
        self.priorities = merged[kept]
        for layer in self.layers:
            fresh = keys[layer][from_new.to(keys[layer].device)].cpu()
            before = self.samples.get(layer)
            self.samples[layer] = fresh if before is None else torch.cat([before[from_old], fresh])

    def _add_products(self, layer: int, keys: Tensor) -> None:
        keys = keys if keys.dtype == torch.float64 else keys.float()
        width = keys.shape[1]
        if layer not in self.sums:
            self.sums[layer] = torch.zeros(width, width, dtype=torch.float64, device=keys.device)
        step = -(-width // _TILES)
        for start in range(0, width, step):
            tile = slice(start, min(start + step, width))
            self.sums[layer][start:, tile] += keys[:, start:].T @ keys[:, tile]

    def merge_ranks(self) -> None:
        """Adds up the ranks' sums and joins their samples; every rank ends with the same."""
        if ranks()[1] == 1:
            return
        count = torch.tensor(float(self.tokens), dtype=torch.float64, device=self.sums[self.layers[0]].device)
        dist.all_reduce(count)
        self.tokens = int(count)
        for layer in self.layers:
            dist.all_reduce(self.sums[layer])
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.priorities, self.samples))
        self.priorities, self.samples = torch.empty(0, dtype=torch.float64), {}
        for priorities, samples in gathered:
            self._sample(priorities, samples)

    def finish(self, model: str) -> KeyStatistics:
        """E[k kᵀ] as full symmetric matrices."""
        moments = {}
        for layer, total in self.sums.items():
            lower = total.tril()
            moment = (lower + lower.tril(-1).T) / self.tokens
            moments[layer] = moment.to(torch.promote_types(self.samples[layer].dtype, torch.float32)).cpu()
        return KeyStatistics(moments, dict(self.samples), self.tokens, model)

    def save(self, path: Path, batches: int, run: str) -> None:
        tensors = {f"sum.{layer}": total for layer, total in self.sums.items()}
        tensors |= {f"sample.{layer}": sample for layer, sample in self.samples.items()}
        tensors["priorities"] = self.priorities
        _save_atomically(tensors, {"tokens": str(self.tokens), "batches": str(batches), "run": run}, path)

    def restore(self, path: Path, run: str, device: torch.device) -> int:
        """Continues from a checkpoint of the same run; the number of batches it holds, 0 where there is none."""
        if not path.is_file():
            return 0
        tensors, metadata = _load(path)
        if metadata.get("run") != run:
            return 0
        self.sums = {layer: tensors[f"sum.{layer}"].to(device) for layer in self.layers}
        self.samples = {layer: tensors[f"sample.{layer}"] for layer in self.layers}
        self.priorities, self.tokens = tensors["priorities"], int(metadata["tokens"])
        return int(metadata["batches"])


@torch.no_grad()
def collect(
    partial: PartialModel,
    documents: Iterable[Sequence[int]],
    layers: Sequence[int],
    *,
    model_id: str,
    begin: Sequence[int] = (),
    sequence_length: int = 512,
    batch_tokens: int = 8192,
    sample_size: int = 4096,
    total_tokens: int | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    run: str = "",
    progress: bool = True,
) -> KeyStatistics:
    """One pass over `documents` (token ids) for all `layers`.

    Args:
        begin: tokens before every sequence (the tokenizer's BOS).
        sequence_length: tokens a packed row; batch_tokens: tokens a forward pass.
        sample_size: keys kept a layer.
        total_tokens: for the progress bar only.
        checkpoint: file for partial sums, written about every `checkpoint_seconds` and removed at the end; a run with
            the same `run` name continues from it and ends with the same bits. Under torch.distributed each rank takes
            every world-size-th batch and keeps a checkpoint of its own.
        progress: show a bar on stderr.

    Raises:
        ValueError: a key is not finite, or the documents are empty.
    """
    rank, world = ranks()
    if checkpoint is not None and world > 1:
        checkpoint = checkpoint.with_suffix(f".{rank}of{world}")
    accumulator = KeyAccumulator(layers, sample_size)
    done = accumulator.restore(checkpoint, run, partial.device) if checkpoint is not None else 0
    rows_a_batch = max(1, batch_tokens // sequence_length)
    rows = pack_rows(documents, begin, sequence_length)
    saved = time.monotonic()
    with frozen(partial.model), track("key statistics", total_tokens, "tok", progress) as bar:
        bar.advance(accumulator.tokens * world)
        batch = 0
        while chunk := list(islice(rows, rows_a_batch)):
            if batch % world == rank and batch >= done:
                accumulator.add(_keys(partial, chunk, layers), batch)
                if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
                    accumulator.save(checkpoint, batch + 1, run)
                    saved = time.monotonic()
            if batch >= done:
                bar.advance(sum(len(ids) for ids, _ in chunk))
            batch += 1
    if accumulator.tokens == 0 and world == 1:
        raise ValueError("documents are empty: no keys to take statistics of")
    accumulator.merge_ranks()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return accumulator.finish(model_id)


def run_name(**settings: Any) -> str:
    """Content key of a statistics run, 16 hex digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _keys(partial: PartialModel, rows: list[tuple[Tensor, Tensor]], layers: Sequence[int]) -> dict[int, Tensor]:
    """Keys [tokens, d] of packed rows; the last row of a corpus is shorter and goes through alone."""
    width = rows[0][0].numel()
    whole = [row for row in rows if row[0].numel() == width]
    groups = [whole] + [[row] for row in rows if row[0].numel() != width]
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for group in groups:
        inputs = {
            "input_ids": torch.stack([ids for ids, _ in group]).to(partial.device),
            "position_ids": torch.stack([positions for _, positions in group]).to(partial.device),
        }
        _, recorded = partial.run(inputs, until=max(layers), keys=layers)
        for layer in layers:
            parts[layer].append(recorded.keys[layer].flatten(0, 1))
    keys = {layer: torch.cat(part) for layer, part in parts.items()}
    for layer, found in keys.items():
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"layer {layer} gives keys that are not finite: the model's weights or dtype are at fault")
    return keys


def _save_atomically(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".tmp")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, staging, metadata=metadata)
    staging.replace(path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
