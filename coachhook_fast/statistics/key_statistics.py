"""Key statistics: E[k kᵀ] of every edited layer, and a sample of keys, in one pass over a corpus.

One truncated forward pass serves all layers: sequences are packed without padding, the pass ends after the last edited
block, products are accumulated in the model's precision over one batch (fp32 at least) and in fp64 over the corpus.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook_fast.models.caches import if_possible, is_there
from coachhook_fast.models.distributed import workers
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.models.passes.products import linear
from coachhook_fast.models.tensor_parallel import is_tensor_parallel
from coachhook_fast.progress import track
from coachhook_fast.statistics.corpus import pack_rows

_HELD_OUT = 256  # keys on which the error is estimated
_TILES = 8  # column tiles of the lower triangle: 9/16 of the full product's work


@dataclass(frozen=True)
class KeyStatistics:
    """Second moments and sample keys of the edited layers.

    Attributes:
        moments: layer -> E[k kᵀ], [d, d], fp32 (fp64 for fp64 models).
        samples: layer -> [S, d] keys of ordinary tokens, uniformly drawn, the same tokens in every layer.
        tokens: number of keys in the moments.
        model: fingerprint of the base model.
        run: content key of the run that took them, "" where it has none.
        text: [N] int32 tokens of the corpus (see `corpus.joined`), more of it than the moments are of; empty in
            files of earlier versions.
    """

    moments: dict[int, Tensor]
    samples: dict[int, Tensor]
    tokens: int
    model: str
    run: str = ""
    text: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

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

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite: a sum with one is none."""
        tensors = [*self.moments.values(), *self.samples.values()]
        return all(bool(torch.isfinite(tensor.sum(dtype=torch.float64))) for tensor in tensors)

    def save(self, path: Path) -> None:
        tensors = {f"moment.{layer}": moment.contiguous() for layer, moment in self.moments.items()}
        tensors |= {f"sample.{layer}": sample.contiguous() for layer, sample in self.samples.items()}
        tensors["text"] = self.text
        _save_atomically(tensors, {"tokens": str(self.tokens), "model": self.model, "run": self.run}, path)

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
            run=metadata.get("run", ""),
            text=tensors.get("text", torch.empty(0, dtype=torch.int32)),
        )


class KeyAccumulator:
    """Running sums of k kᵀ (fp64, lower triangle) and a uniform sample of keys, for several layers at once.

    With `parts` 2 the batches are summed up alternately in two halves, whose disagreement tells the error of the whole.
    """

    def __init__(self, layers: Sequence[int], sample_size: int, *, parts: int = 1, seed: int = 0) -> None:
        self.layers = tuple(layers)
        self.sample_size = sample_size
        self.parts = parts
        self.seed = seed
        self.sums: dict[tuple[int, int], Tensor] = {}  # (layer, part) -> [d, d]
        self.samples: dict[int, Tensor] = {}
        self.priorities = torch.empty(0, dtype=torch.float64)
        self.tokens = 0
        self._looked_at = 0  # tokens when the error was last estimated

    def add(self, keys: dict[int, Tensor], batch: int) -> None:
        """Adds the keys [N, d] of one batch; `batch` numbers it, so that its share of the sample is its own."""
        count = next(iter(keys.values())).shape[0]
        draws = torch.rand(
            count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + batch), dtype=torch.float64
        )
        self._sample(draws, keys)
        for layer in self.layers:
            self._add_products((layer, batch % self.parts), keys[layer])
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

    def _add_products(self, slot: tuple[int, int], keys: Tensor) -> None:
        keys = keys if keys.dtype == torch.float64 else keys.float()
        width = keys.shape[1]
        if slot not in self.sums:
            self.sums[slot] = torch.zeros(width, width, dtype=torch.float64, device=keys.device)
        step = -(-width // _TILES)
        columns = keys.T.contiguous()
        for start in range(0, width, step):
            tile = slice(start, min(start + step, width))
            self.sums[slot][start:, tile] += linear(columns[start:], columns[tile])

    def is_enough(self, unseen: dict[int, Tensor], tolerance: float) -> bool:
        """Whether `error` is below `tolerance`, asked of some of the `unseen` keys when the sums have grown by half."""
        if self.tokens == 0 or self.tokens < 1.5 * self._looked_at:
            return False
        self._looked_at = self.tokens
        return self.error({layer: keys[:_HELD_OUT] for layer, keys in unseen.items()}) < tolerance

    def error(self, keys: dict[int, Tensor]) -> float:
        """Estimated relative error of C⁻¹k, the largest over layers of the median over `keys` [N, d] not yet added.

        The halves' errors are independent and √2 times the whole's, so half their difference is the size of the
        whole's error. Infinite while a half cannot be inverted. Needs `parts` 2.
        """
        worst = 0.0
        for layer in self.layers:
            solved = []
            for part in (0, 1):
                total = self.sums.get((layer, part))
                factor, info = (None, 1) if total is None else torch.linalg.cholesky_ex(total)  # reads the lower half
                if factor is None or int(info) != 0:
                    return math.inf
                solved.append(torch.cholesky_solve(keys[layer].to(factor).T, factor))
            one, other = solved
            # The halves hold about as many keys; scaled to one length only their directions and shapes are compared.
            other = other * (one.norm() / other.norm())
            worst = max(worst, float(((one - other).norm(dim=0) / (one + other).norm(dim=0)).median()))
        return worst

    def merge_ranks(self, world: int) -> None:
        """Adds up the sums of `world` ranks and joins their samples; every rank ends with the same."""
        if world == 1:
            return
        count = torch.tensor(float(self.tokens), dtype=torch.float64, device=next(iter(self.sums.values())).device)
        dist.all_reduce(count)
        self.tokens = int(count)
        for layer in self.layers:
            dist.all_reduce(self.sums[layer, 0])
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (self.priorities, self.samples))
        self.priorities, self.samples = torch.empty(0, dtype=torch.float64), {}
        for priorities, samples in gathered:
            self._sample(priorities, samples)

    def finish(self, model: str) -> KeyStatistics:
        """E[k kᵀ] as full symmetric matrices."""
        moments = {}
        for layer in self.layers:
            total, *others = [found for (owner, _), found in self.sums.items() if owner == layer]
            for other in others:
                total = total + other
            lower = total.tril()
            moment = (lower + lower.tril(-1).T) / self.tokens
            moments[layer] = moment.to(torch.promote_types(self.samples[layer].dtype, torch.float32)).cpu()
        return KeyStatistics(moments, dict(self.samples), self.tokens, model)

    def save(self, path: Path, batches: int, run: str) -> None:
        tensors = {f"sum.{layer}.{part}": total for (layer, part), total in self.sums.items()}
        tensors |= {f"sample.{layer}": sample for layer, sample in self.samples.items()}
        tensors["priorities"] = self.priorities
        counts = {"tokens": str(self.tokens), "looked_at": str(self._looked_at), "batches": str(batches)}
        _save_atomically(tensors, {**counts, "run": run}, path)

    def restore(self, path: Path, run: str, device: torch.device) -> int:
        """Continues from a checkpoint of the same run; the number of batches it holds, 0 where there is none."""
        if not is_there(path):
            return 0
        try:
            tensors, metadata = _load(path)
        except ValueError as error:  # a disk that was full, or a copy that was cut off
            warnings.warn(f"{error}; the pass begins anew", stacklevel=2)
            return 0
        if metadata.get("run") != run:
            return 0
        slots = [(layer, part) for layer in self.layers for part in range(self.parts)]
        names = {slot: f"sum.{slot[0]}.{slot[1]}" for slot in slots}
        self.sums = {slot: tensors[name].to(device) for slot, name in names.items() if name in tensors}
        self.samples = {layer: tensors[f"sample.{layer}"] for layer in self.layers}
        self.priorities = tensors["priorities"]
        self.tokens, self._looked_at = int(metadata["tokens"]), int(metadata["looked_at"])
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
    tolerance: float | None = None,
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
        tolerance: end before the documents do, once the estimated relative error of C⁻¹k is below it (looked at
            whenever the keys have grown by half); it takes a second set of sums.
        checkpoint: file for partial sums, written about every `checkpoint_seconds` and removed at the end; a run with
            the same `run` name and as many rows a pass continues from it and ends with the same bits. Under
            torch.distributed each rank takes every world-size-th batch and keeps a checkpoint of its own; ranks that
            share the model's weights out all take every batch, and keep none.
        progress: show a bar on stderr.

    Raises:
        ValueError: a key is not finite, the documents are empty, or a tolerance is asked of several ranks.
    """
    rank, world = workers(partial.model)
    if tolerance is not None and world > 1:
        raise ValueError(f"tolerance {tolerance} needs a single process, there are {world} ranks: give a token budget")
    if is_tensor_parallel(partial.model):
        checkpoint = None  # ranks that begin at different batches would wait for one another
    if checkpoint is not None and world > 1:
        checkpoint = checkpoint.with_suffix(f".{rank}of{world}")
    rows_a_batch = max(1, batch_tokens // sequence_length)
    run = f"{run} {rows_a_batch}"  # a checkpoint counts batches
    accumulator = KeyAccumulator(layers, sample_size, parts=1 if tolerance is None else 2)
    done = accumulator.restore(checkpoint, run, partial.device) if checkpoint is not None else 0
    rows = pack_rows(documents, begin, sequence_length)
    saved = time.monotonic()
    with frozen(partial.model), track("key statistics", total_tokens, "tok", progress) as bar:
        bar.advance(accumulator.tokens * world)
        batch = 0
        while chunk := list(islice(rows, rows_a_batch)):
            if batch % world == rank and batch >= done:
                keys = _keys(partial, chunk, layers)
                if tolerance is not None and accumulator.is_enough(keys, tolerance):
                    break
                accumulator.add(keys, batch)
                if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
                    with if_possible():
                        accumulator.save(checkpoint, batch + 1, run)
                    saved = time.monotonic()
            if batch >= done:
                bar.advance(sum(len(ids) for ids, _ in chunk))
            batch += 1
    if accumulator.tokens == 0 and world == 1:
        raise ValueError("documents are empty: no keys to take statistics of")
    accumulator.merge_ranks(world)
    if checkpoint is not None and is_there(checkpoint):
        with if_possible():
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
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, staging, metadata=metadata)
    staging.replace(path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, since products of tensors that lie where the file puts them can differ in their last bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
